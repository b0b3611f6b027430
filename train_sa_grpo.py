"""SA-GRPO: group-relative policy optimisation with self-aligned reward (arXiv 2509.05489).

    python train_sa_grpo.py                          # the embedded model on two cores, 5 minutes
    python train_sa_grpo.py --reward vr              # plain GRPO: without R_SA; more in --help
    python train_sa_grpo.py --model qwen-1.5b        # the paper's settings
    python train_sa_grpo.py --name NAME --resume     # go on after a stop or a kill

Every step: sample n answers to each of P questions; score each answer with its question, without
it, and under the frozen start; reward R = R_VR + alpha R_SA; advantage = reward minus the group's
mean; then an optimizer step per minibatch of questions on

    mean over answers of  1 / max_new_tokens * sum over tokens of  [ policy loss + kl_coef * k3 ]

As in Dr. GRPO there is no division by the group's deviation nor by the answer's own length: neither
easy questions nor short answers weigh more.
Letters: P questions, n answers each, N = P * n answers, L tokens of all answers of a micro-batch.
"""
import torch
from torch import Tensor

from data.problems import batch_of, training_problems
from data.prompts import encode_prompt
from evaluate import comparison_table, evaluate
from kernels import keep_freed_memory
from model import GPT
from runtime import parallel, runs, settings
from runtime.errors import user_errors
from runtime.parallel import concat
from sar import alpha_at, self_aligned_reward, total_reward

PAPER = dict(  # the paper and its public code
    data="gsm8k,math,openr1",
    max_prompt_tokens=1024,
    max_new_tokens=4096,  # also the constant that the loss is divided by
    reward="sar",  # with its alpha of 0.2 (sar.REWARDS)
    score_with="policy",
    verifier="strict",
    steps=500,
    prompts_per_step=128,  # in two minibatches of 64
    samples=6,
    epochs=1,
    lr=1e-6,
    kl_coef=0.001,
    temperature=1.0,
    seed=0,
    save_every=50,
    eval_every=0,
)
TINY = PAPER | dict(  # the embedded model
    data="tiny", max_prompt_tokens=128, max_new_tokens=256, steps=140, prompts_per_step=16,
    samples=8, lr=8e-5, save_every=70, eval_every=35,
)
CLIP, DUAL_CLIP, WEIGHT_DECAY, MAX_GRAD_NORM = 0.2, 3.0, 0.01, 1.0


def group_advantages(rewards: Tensor) -> Tensor:
    """rewards (P, n) -> (P, n): each minus its group's mean (Dr. GRPO, arXiv 2503.20783).

    A group of equal rewards gets exactly zero, however its mean is rounded.
    """
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (P, 1)
    centred = rewards - rewards.mean(1, keepdim=True)
    return torch.where(equal, torch.zeros_like(centred), centred)


def shortest_advantages(rewards: Tensor, lengths: Tensor, keep: int | None) -> Tensor:
    """GFPO (arXiv 2508.09726, a secondary source): only the `keep` shortest of a group teach.

    rewards, lengths (P, n) -> (P, n): group_advantages among these, else zero. keep None: of all.
    """
    kept = lengths.argsort(dim=1, stable=True)[:, :keep].sort(1).values  # (P, keep)
    return torch.zeros_like(rewards).scatter(1, kept, group_advantages(rewards.gather(1, kept)))


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


def kl_k3(logprob: Tensor, frozen_logprob: Tensor) -> Tensor:
    """(L,) estimate of KL(policy || frozen) per token, never negative: exp(d) - d - 1.

    d = log frozen - log policy (k3 of J. Schulman, "Approximating KL divergence", 2020).
    """
    d = (frozen_logprob - logprob).clamp(-20, 20)  # like the authors; beyond, no gradient
    return (d.exp() - d - 1).clamp_max(10)


def main(argv: list[str] | None = None):
    # ---- settings ----
    keep_freed_memory()
    parser = settings.training_parser("Train with SA-GRPO (arXiv 2509.05489).", PAPER, TINY)
    parser.add_argument("--keep", type=settings.positive_int, help="GFPO: so many shortest teach")
    args = settings.parse(parser, "grpo", argv)
    if not 2 <= (args.keep or args.samples) <= args.samples:
        raise ValueError(f"--samples {args.samples}, --keep {args.keep}: a group needs at least 2 "
                         "answers, their mean is the baseline, and keeps no more than it has")

    # ---- data and models ----
    folder, tokenizer = settings.open_model(args.model, args)
    problems, held_out = training_problems(args, tokenizer, folder)
    judge = settings.judge_of(args.verifier)
    no_question = encode_prompt(tokenizer, "")  # what ppl(a) is conditioned on
    run = runs.Run(args, "grpo", folder)
    place = dict(device="cpu" if args.offload else args.device, shard=parallel.sharding(args),
                 length=args.max_prompt_tokens + args.max_new_tokens)
    masters = GPT.from_pretrained(run.checkpoint or folder, **place)  # float32 weights, always
    frozen = None
    if args.kl_coef or args.score_with == "frozen":
        frozen = GPT.from_pretrained(folder, dtype=getattr(torch, args.dtype), **place)
        frozen.requires_grad_(False)
    policy = parallel.working_copy(masters, args)
    sampler = parallel.sampler_for(policy, args)
    optimizer = torch.optim.AdamW(masters.parameters(), args.lr, weight_decay=WEIGHT_DECAY,
                                  fused=True)
    if run.checkpoint:
        runs.load_optimizer(run.checkpoint / "optimizer.safetensors", masters, optimizer)

    def evaluate_now(steps_done: int):
        result = evaluate(sampler, tokenizer, held_out, args)
        run.log("evals.jsonl", {"step": steps_done, **result})

    # ---- the loop ----
    if run.evaluation_due():
        evaluate_now(run.step)
    for step in run.steps(f"GRPO with reward {args.reward}"):
        # 1. sample n answers to each of P questions
        questions = batch_of(problems, step, args.prompts_per_step, args.seed)
        answers = parallel.sample(sampler, tokenizer, questions, args, args.seed * 2**32 + step)
        prompts, tokens = [a.prompt for a in answers], [a.tokens for a in answers]  # N lists each
        run.lap("sampling")

        # 2. score every token: after its question, without it, and under the frozen start
        both = parallel.score(policy, prompts + [no_question] * len(answers), tokens * 2, args)
        with_question, without_question = both[:len(answers)], both[len(answers):]  # (len(a),) each
        start = parallel.score(frozen, prompts, tokens, args) if frozen else with_question
        given, alone = with_question, without_question  # what R_SA compares
        if args.score_with == "frozen":
            given, alone = start, parallel.score(frozen, [no_question] * len(answers), tokens, args)

        # 3. reward, and its advantage within the group
        verdicts = [judge(a.text, a.problem.answer) for a in answers]
        r_vr = torch.tensor([v.reward for v in verdicts]).double()  # (N,)
        r_sa = self_aligned_reward(given, alone)  # (N,)
        alpha = alpha_at(step, args.steps, args.alpha, args.alpha_end)
        lengths = torch.tensor([len(t) for t in tokens])  # (N,)
        rewards = total_reward(args.reward, r_vr, r_sa, given, lengths, alpha=alpha,
                               samples=args.samples, longest=args.max_new_tokens)  # (N,)
        groups = -1, args.samples  # (P, n)
        advantages = shortest_advantages(rewards.view(groups), lengths.view(groups), args.keep)
        parallel.note(answers, verdict=verdicts, with_question=with_question,
                      without_question=without_question, frozen=start, r_sa=r_sa,
                      reward=rewards, advantage=advantages.flatten())
        run.lap("scoring")

        # 4. update: an optimizer step per minibatch of questions
        means = parallel.Means()
        for minibatch in parallel.minibatches(answers, args, step):
            denominator = len(minibatch) * args.max_new_tokens  # of the whole minibatch
            for micro in parallel.micro_batches(minibatch, args.micro_tokens):
                old = concat([a.with_question for a in micro], args)  # (L,)
                start = concat([a.frozen for a in micro], args)  # (L,)
                advantage = concat([a.advantage.expand(len(a.tokens)) for a in micro], args)
                logprob, entropy = parallel.score_with_gradient(policy, micro, args)  # (L,) each
                token_loss, clipped = policy_loss(logprob, old, advantage.to(old))
                kl = kl_k3(logprob, start)
                if args.kl_coef:
                    token_loss = token_loss + args.kl_coef * kl
                loss = token_loss.sum() / denominator
                run.must_be_finite("loss", loss, micro)
                loss.backward()
                means.add(loss=loss, kl=kl, entropy=entropy, clipped=clipped, drift=logprob - old)
            grad_norm = parallel.clip_gradients(policy, MAX_GRAD_NORM)
            run.must_be_finite("gradient", grad_norm, minibatch)
            parallel.optimizer_step(optimizer, masters, policy)
            means.add(grad_norm=grad_norm)
        parallel.copy_weights_to(sampler, policy)
        run.lap("update")

        # 5. log, save, evaluate
        run.log_step(answers, means, advantage_std=advantages.std(),
                     no_signal=(advantages == 0).all(1).double().mean(),
                     r_vr_group_std=r_vr.view(-1, args.samples).std(1).mean(),
                     r_sa_group_std=r_sa.view(-1, args.samples).std(1).mean())
        if run.checkpoint_due():
            run.save(tokenizer, masters, optimizer)
        if run.evaluation_due():
            evaluate_now(step + 1)
    evaluations = run.finish("train_sa_grpo.py")
    if evaluations:
        print(comparison_table(evaluations))


if __name__ == "__main__":
    with user_errors():
        main()
