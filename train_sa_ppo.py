"""SA-PPO: proximal policy optimisation with self-aligned reward (arXiv 2509.05489).

    python train_sa_ppo.py                           # the embedded model on two cores, 5 minutes
    python train_sa_ppo.py --reward vr               # plain PPO: without R_SA; more in --help
    python train_sa_ppo.py --model qwen-1.5b         # the paper's settings
    python train_sa_ppo.py --name NAME --resume      # go on after a stop or a kill

Every step: sample an answer to each of P questions; score each answer with its question, without
it, and (where a KL is asked for) under the frozen start; reward R = R_VR + alpha R_SA at the
answer's last token; values of every token from a critic of its own; advantages by GAE, whitened
over the batch; then, per minibatch, an optimizer step of the policy and one of the critic on

    mean over tokens of  [ policy loss + kl_coef * k3 ]   and   mean over tokens of  value loss

Letters: P questions, n answers each (1 by default), N = P * n answers, T tokens of the longest, L
tokens of all answers of a micro-batch.
"""
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.problems import batch_of, training_problems
from data.prompts import encode_prompt
from evaluate import comparison_table, evaluate
from kernels import keep_freed_memory
from model import GPT
from runtime import parallel, runs, settings
from runtime.errors import user_errors
from runtime.parallel import concat
from sar import alpha_at, self_aligned_reward, token_values, total_reward

PAPER = dict(  # the paper and its public code
    data="gsm8k,math,openr1",
    max_prompt_tokens=1024,
    max_new_tokens=4096,
    reward="sar",  # with its alpha of 0.2 (sar.REWARDS)
    score_with="policy",
    verifier="strict",
    steps=500,
    prompts_per_step=128,  # in two minibatches of 64
    samples=1,
    credit="answer",
    epochs=1,
    lr=1e-6,
    critic_lr=2e-6,
    critic_warmup=0,
    gamma=1.0,
    lam=1.0,
    kl_coef=0.0,
    kl_in_reward=False,
    temperature=1.0,
    seed=0,
    save_every=50,
    eval_every=0,
)
TINY = PAPER | dict(  # the embedded model
    data="tiny", max_prompt_tokens=128, max_new_tokens=256, steps=60, lr=1.5e-4, critic_lr=2e-4,
    save_every=70, eval_every=20,
)
CLIP, DUAL_CLIP, VALUE_CLIP, WEIGHT_DECAY, MAX_GRAD_NORM = 0.2, 3.0, 0.5, 0.01, 1.0


class Critic(torch.nn.Module):
    """A decoder that starts as the policy's copy, with a scalar head that starts at zero."""

    def __init__(self, body: GPT):
        super().__init__()
        self.body = body
        head = torch.zeros(body.config.width, dtype=body.norm.dtype, device=body.norm.device)
        self.head = torch.nn.Parameter(head)  # (D,)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(tokens)

    def value(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (L, D), which also predicts each answer token -> expected reward before it (L,).

        No matmul: autocast would round it to bfloat16.
        """
        return (hidden.to(self.head.dtype) * self.head).sum(-1)


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float, lengths: Tensor
        ) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16).

    rewards, values (N, T), lengths (N,) -> advantages, returns (N, T), zero beyond each length.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lam A_{t+1}
        return_t = A_t + V_t

    An answer is over after its last token and V is zero there, also when it was cut at
    max_new_tokens: a cut answer is judged as it stands, so there is no bootstrap from the critic.
    """
    advantages = torch.zeros_like(rewards)
    inside = torch.arange(rewards.shape[1]) < lengths[:, None]  # (N, T)
    values = values.where(inside, 0.0)  # a value beyond the end, NaN even, never enters
    carried = next_value = torch.zeros(len(rewards), dtype=rewards.dtype)  # (N,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = (delta + gamma * lam * carried).where(inside[:, t], 0.0)
        next_value = values[:, t]
        advantages[:, t] = carried
    return advantages, advantages + values


def whiten(advantages: Tensor) -> Tensor:
    """(tokens,) of the batch -> mean 0 and (sample) deviation 1. Equal but for rounding: zeros."""
    spread = advantages.max() - advantages.min()
    if spread <= 1e-10 * advantages.abs().max():
        return torch.zeros_like(advantages)
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def policy_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss (arXiv 1707.06347, eq. 7) with the dual clip of arXiv 1912.09729, eq. 5.

    logprob, old_logprob, advantage (L,) -> loss (L,), and clipped (L,): the clip took the gradient
    away. A negative advantage costs at most DUAL_CLIP times its size, however much likelier its
    token has become. The log-ratio is held within +-20, as by the authors: exp must not overflow.
    """
    ratio = (logprob - old_logprob).clamp(-20, 20).exp()
    plain = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - CLIP, 1 + CLIP)
    loss = torch.maximum(plain, bounded)
    ceiling = -advantage * DUAL_CLIP
    dual = (advantage < 0) & (loss > ceiling)
    return torch.where(dual, ceiling, loss), (bounded > plain) | dual


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor) -> Tensor:
    """(L,) half the squared error; or that of the value held near the old one, if it is larger."""
    held = old_value + (value - old_value).clamp(-VALUE_CLIP, VALUE_CLIP)
    return 0.5 * torch.maximum((value - returns) ** 2, (held - returns) ** 2)


def kl_k3(logprob: Tensor, frozen_logprob: Tensor) -> Tensor:
    """(L,) estimate of KL(policy || frozen) per token, never negative: exp(d) - d - 1.

    d = log frozen - log policy (k3 of J. Schulman, "Approximating KL divergence", 2020).
    """
    d = (frozen_logprob - logprob).clamp(-20, 20)  # like the authors; beyond, no gradient
    return (d.exp() - d - 1).clamp_max(10)


def main(argv: list[str] | None = None):
    # ---- settings ----
    keep_freed_memory()
    parser = settings.training_parser("Train with SA-PPO (arXiv 2509.05489).", PAPER, TINY)
    parser.flag("--critic-lr", settings.positive_float, "the critic's AdamW learning rate")
    parser.flag("--critic-warmup", settings.natural, "steps in which only the critic learns")
    parser.flag("--credit", str, "answer: alpha R_SA is paid at the last token; token: each token "
                "gets alpha v_j / L, R_SA to first order, unclipped", choices=("answer", "token"))
    parser.flag("--gamma", settings.share, "discount per token")
    parser.flag("--lam", settings.share, "GAE's lambda")
    parser.add_argument("--kl-in-reward", action="store_true", default=None, help="take --kl-coef "
                        "times the log-ratio to the start off every token's reward, instead of "
                        "adding k3 to the loss")
    args = settings.parse(parser, "ppo", argv)
    if args.kl_in_reward and not args.kl_coef:
        raise ValueError("--kl-in-reward needs a --kl-coef above 0: how much of the KL is taken "
                         "off the reward")
    if args.credit == "token" and args.reward != "sar":
        raise ValueError(f"--credit token is for --reward sar, not {args.reward}")

    # ---- data and models ----
    folder, tokenizer = settings.open_model(args.model, args)
    problems, held_out = training_problems(args, tokenizer, folder)
    judge = settings.judge_of(args.verifier)
    no_question = encode_prompt(tokenizer, "")  # what ppl(a) is conditioned on
    run = runs.Run(args, "ppo", folder, models=2)
    place = dict(device="cpu" if args.offload else args.device, shard=parallel.sharding(args),
                 length=args.max_prompt_tokens + args.max_new_tokens)
    masters = GPT.from_pretrained(run.checkpoint or folder, **place)  # float32 weights, always
    critic_masters = Critic(GPT.from_pretrained(folder, **place))
    if place["shard"]:
        place["shard"](critic_masters)
    frozen = None
    if args.kl_coef or args.score_with == "frozen":
        frozen = GPT.from_pretrained(folder, dtype=getattr(torch, args.dtype), **place)
        frozen.requires_grad_(False)
    optimizer = torch.optim.AdamW(masters.parameters(), args.lr, weight_decay=WEIGHT_DECAY,
                                  fused=True)
    critic_optimizer = torch.optim.AdamW(critic_masters.parameters(), args.critic_lr,
                                         weight_decay=WEIGHT_DECAY, fused=True)
    if run.checkpoint:
        runs.load_optimizer(run.checkpoint / "optimizer.safetensors", masters, optimizer)
        runs.load_parameters(run.checkpoint / "critic.safetensors", critic_masters)
        runs.load_optimizer(run.checkpoint / "critic_optimizer.safetensors", critic_masters,
                            critic_optimizer)
    policy = parallel.working_copy(masters, args)
    critic = parallel.working_copy(critic_masters, args)
    sampler = parallel.sampler_for(policy, args)

    def evaluate_now(steps_done: int):
        result = evaluate(sampler, tokenizer, held_out, args)
        run.log("evals.jsonl", {"step": steps_done, **result})

    # ---- the loop ----
    if run.evaluation_due():
        evaluate_now(run.step)
    for step in run.steps(f"PPO with reward {args.reward}"):
        # 1. sample n answers to each of P questions
        questions = batch_of(problems, step, args.prompts_per_step, args.seed)
        answers = parallel.sample(sampler, tokenizer, questions, args, args.seed * 2**32 + step)
        prompts, tokens = [a.prompt for a in answers], [a.tokens for a in answers]  # N lists each
        run.lap("sampling")

        # 2. score every token: after its question, without it, under the frozen start; its value
        both = parallel.score(policy, prompts + [no_question] * len(answers), tokens * 2, args)
        with_question, without_question = both[:len(answers)], both[len(answers):]  # (len(a),) each
        start = parallel.score(frozen, prompts, tokens, args) if frozen else with_question
        given, alone = with_question, without_question  # what R_SA compares
        if args.score_with == "frozen":
            given, alone = start, parallel.score(frozen, [no_question] * len(answers), tokens, args)
        values = parallel.score(critic, prompts, tokens, args, critic.value)  # (len(a),) each

        # 3. reward at the last token; advantages by GAE, whitened over the batch
        verdicts = [judge(a.text, a.problem.answer) for a in answers]
        r_vr = torch.tensor([v.reward for v in verdicts]).double()  # (N,)
        r_sa = self_aligned_reward(given, alone)  # (N,)
        alpha = alpha_at(step, args.steps, args.alpha, args.alpha_end)
        lengths = torch.tensor([len(t) for t in tokens])  # (N,)
        rewards = total_reward(args.reward, r_vr, r_sa, given, lengths, alpha=alpha,
                               samples=args.samples, longest=args.max_new_tokens)  # (N,)
        final, token_rewards = rewards, torch.zeros(len(answers), max(lengths)).double()  # (N, T)
        if args.credit == "token":  # mean v is R_SA to first order; the clip is not applied
            shares = [alpha * token_values(g, w) / len(g) for g, w in zip(given, alone)]
            token_rewards += pad_sequence(shares, True)
            final, rewards = r_vr, r_vr + token_rewards.sum(1)
        if args.kl_in_reward:
            log_ratio = pad_sequence(with_question, True) - pad_sequence(start, True)
            token_rewards -= args.kl_coef * log_ratio
        token_rewards[torch.arange(len(answers)), lengths - 1] += final
        padded_values = pad_sequence(values, True).double()  # (N, T)
        advantages, returns = gae(token_rewards, padded_values, args.gamma, args.lam, lengths)
        inside = torch.arange(max(lengths)) < lengths[:, None]  # (N, T)
        raw, returns = advantages[inside], returns[inside]  # (tokens,), answer after answer
        parallel.note(answers, verdict=verdicts, with_question=with_question,
                      without_question=without_question, frozen=start, r_sa=r_sa, reward=rewards,
                      values=values, advantage=whiten(raw).split(lengths.tolist()),
                      returns=returns.split(lengths.tolist()))
        run.lap("scoring")

        # 4. update: an optimizer step per minibatch of questions
        means = parallel.Means()
        for minibatch in parallel.minibatches(answers, args, step):
            denominator = sum(len(a.tokens) for a in minibatch)  # of the whole minibatch
            for micro in parallel.micro_batches(minibatch, args.micro_tokens):
                old = concat([a.with_question for a in micro], args)  # (L,)
                start = concat([a.frozen for a in micro], args)  # (L,)
                advantage = concat([a.advantage for a in micro], args)  # (L,)
                logprob, entropy = parallel.score_with_gradient(policy, micro, args)  # (L,) each
                token_loss, clipped = policy_loss(logprob, old, advantage.to(old))
                kl = kl_k3(logprob, start)
                if args.kl_coef and not args.kl_in_reward:
                    token_loss = token_loss + args.kl_coef * kl
                loss = token_loss.sum() / denominator
                run.must_be_finite("loss", loss, micro)
                loss.backward()  # before the critic's forward: one graph in memory at a time
                old_value = concat([a.values for a in micro], args)  # (L,)
                returned = concat([a.returns for a in micro], args)  # (L,)
                value = parallel.score_with_gradient(critic, micro, args, critic.value)  # (L,)
                critic_loss = value_loss(value, old_value, returned.to(old)).sum() / denominator
                run.must_be_finite("value loss", critic_loss, micro)
                critic_loss.backward()
                means.add(loss=loss, kl=kl, entropy=entropy, clipped=clipped, drift=logprob - old,
                          value_loss=critic_loss)
            grad_norm = parallel.clip_gradients(policy, MAX_GRAD_NORM)
            critic_grad_norm = parallel.clip_gradients(critic, MAX_GRAD_NORM)
            run.must_be_finite("gradient", grad_norm + critic_grad_norm, minibatch)
            if step >= args.critic_warmup:
                parallel.optimizer_step(optimizer, masters, policy)
            parallel.optimizer_step(critic_optimizer, critic_masters, critic)
            policy.zero_grad()  # also where it did not learn
            means.add(grad_norm=grad_norm, critic_grad_norm=critic_grad_norm)
        parallel.copy_weights_to(sampler, policy)
        run.lap("update")

        # 5. log, save, evaluate
        all_values = torch.cat(values).double()  # (tokens,)
        unexplained = (returns - all_values).var() / returns.var()
        run.log_step(answers, means, advantage_std=raw.std(), value_mean=all_values.mean(),
                     value_std=all_values.std(), return_mean=returns.mean(),
                     explained_variance=1 - unexplained)
        if run.checkpoint_due():
            run.save(tokenizer, masters, optimizer, critic_masters, critic_optimizer)
        if run.evaluation_due():
            evaluate_now(step + 1)
    evaluations = run.finish("train_sa_ppo.py")
    if evaluations:
        print(comparison_table(evaluations))


if __name__ == "__main__":
    with user_errors():
        main()
