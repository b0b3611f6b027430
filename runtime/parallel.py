"""One process or many: the same program.

Under torchrun weights, gradients and optimizer states are sharded over the processes (FSDP2), and
each holds a whole copy of the weights for sampling. All that is sampled or scored is all-gathered:
every process computes what follows (rewards, advantages, micro-batches), the same in all. All make
the same collectives in the same order: no branch around one depends on data of one process only.
"""
import atexit
import contextlib
import copy
import functools
import itertools
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import sar
from data.problems import Problem, shuffled
from data.prompts import encode_prompt, opened_thinking
from model import GPT
from rollout import generate
from verify import Verdict

PATIENCE = 30  # seconds that a process waits in silence for the others
store = None  # torchrun's key-value store: small values that the processes share by name
store_calls = itertools.count()  # numbers the uses of the store, alike in every process


# ---- processes ----


def processes() -> tuple[int, int]:
    """(rank, world): this process's number and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes():
    """Meet the other processes, if torchrun started several. All but rank 0 keep quiet."""
    global store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    slow = threading.Timer(PATIENCE, sys.stderr.write, [
        f"note: waiting for the other processes of WORLD_SIZE={os.environ['WORLD_SIZE']} (this is "
        f"RANK={os.environ.get('RANK')}); to run one alone, unset these variables\n"])
    slow.daemon = True
    slow.start()
    store, rank, world = next(dist.rendezvous("env://"))
    store = fresh_namespace(store, rank, world)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    slow.cancel()
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    if rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


def fresh_namespace(store, rank: int, world: int):
    """A part of the store that no earlier process has used: after a restart torchrun's still holds
    the old ones' keys, their addresses for example. Rank 0 makes up a name, tells it to every
    process that asks, and goes on when all have confirmed it."""
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"question {rank}", question)
        name = store.get(f"answer to {question}").decode()
        store.set(f"{name} {rank}", "confirmed")
        return dist.PrefixStore(name, store)
    name = uuid.uuid4().hex
    while not store.check([f"{name} {other}" for other in range(1, world)]):
        for other in range(1, world):
            if store.check([f"question {other}"]):
                question = store.get(f"question {other}").decode()
                store.set(f"answer to {question}", name)
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def from_rank_0(find):
    """find() as it is on rank 0, for all processes: anything that JSON can hold."""
    rank, world = processes()
    if world == 1:
        return find()
    key = f"from rank 0: {next(store_calls)}"
    if rank == 0:
        store.set(key, json.dumps(find()))
    return json.loads(store.get(key))


# ---- sharded weights ----


def sharding(args):
    """The `shard` of GPT.from_pretrained: None for one process, else FSDP2 by rows. A block's
    weights are gathered when its turn comes and freed after it. The root's stay whole until the
    backward ends, since the loss takes `policy.unembedding`. With --dtype bfloat16 the gathered
    copies are bfloat16; the shards and the sums of gradients stay float32."""
    if processes()[1] == 1:
        return None
    mesh = init_device_mesh(args.device.split(":")[0], (processes()[1],))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32,
                                cast_forward_inputs=False)

    def shard(model):
        blocks = getattr(model, "blocks", [])  # a critic's own head has none and stays float32
        mixed = half if args.dtype == "bfloat16" and blocks else MixedPrecisionPolicy()
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh, mp_policy=mixed,
                        reshard_after_forward=module is not model)
            module.set_gradient_divide_factor(1.0)  # sums: the loss has its own denominator
            module.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
        return own_rows
    return shard


def own_rows(p: Tensor) -> tuple[Tensor, int]:
    """The rows of a parameter or optimizer state that are here, and the number of the first."""
    if not isinstance(p, DTensor):
        return p.detach(), 0
    rank, world = processes()
    return p.detach().to_local(), min(rank * -(-len(p) // world), len(p))


def all_gather(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """All rows of a sharded tensor. A collective: every process must call it."""
    p = p.detach().to(dtype or p.dtype)  # before it travels
    return p.full_tensor() if isinstance(p, DTensor) else p


def reshard(model):
    """Free gathered weights: parameters() then lists the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def working_copy(masters, args):
    """The model that is trained: the float32 masters themselves, in float32 or sharded; else a copy
    on the device, kept current: bfloat16 matrices, float32 norms, biases and gradients."""
    for block in getattr(masters, "body", masters).blocks:  # a critic has a body
        block.recompute = args.recompute
    if args.dtype == "float32" or isinstance(masters, FSDPModule):
        return masters
    working = copy.deepcopy(masters)
    working._apply(lambda p: p.to(args.device, p.dtype if p.dim() == 1 else torch.bfloat16))
    for p in working.parameters():
        p.grad_dtype = torch.float32
    return working


@torch.no_grad()
def optimizer_step(optimizer, masters, policy):
    """Update the masters with the policy's gradients, then free these. Where the policy is a copy,
    a parameter at a time: the host needs room for one gradient only."""
    if masters is policy:
        optimizer.step()
        return optimizer.zero_grad()
    for master, p in zip(masters.parameters(), policy.parameters()):
        if p.grad is not None:
            master.grad = p.grad.to(master.device)
            optimizer.step()  # of this parameter: no other master has a gradient
            p.copy_(master)
            master.grad = p.grad = None


def sampler_for(policy: GPT, args) -> GPT:
    """The model that samples: the policy itself, if it is whole; else a copy in --dtype, whole in
    every process, which copy_weights_to keeps current."""
    if not isinstance(policy, FSDPModule):
        return policy
    with torch.device("meta"):
        sampler = GPT(policy.config).to(getattr(torch, args.dtype)).requires_grad_(False)
    sampler.to_empty(device=args.device)
    sampler.long_rope = policy.long_rope
    copy_weights_to(sampler, policy)
    return sampler


@torch.no_grad()
def copy_weights_to(sampler: GPT, policy: GPT):
    """Bring the sampler's weights up to date, in place, one parameter at a time."""
    if sampler is not policy:
        reshard(policy)
        for own, new in zip(sampler.parameters(), policy.parameters()):
            own.copy_(all_gather(new, own.dtype))


def clip_gradients(model, limit: float) -> Tensor:
    """Scale the gradients to a norm of at most `limit`; returns the norm that they had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def autocast(args):
    """Where --dtype is bfloat16: bfloat16 matmuls beside a float32 residual stream."""
    if args.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(args.device.split(":")[0], torch.bfloat16)


# ---- answers ----


@dataclass
class Answer:
    """A sampled answer; `note` adds what the scripts compute of it, in the order of the fields."""
    problem: Problem
    prompt: list[int]
    tokens: list[int]  # the stop token included
    finished: bool  # ended by a stop token, not by the limit
    logprobs: Tensor  # (len,) as the sampler computed them; all log-probs are at --temperature
    text: str  # without the stop token, but with a <think> that the prompt ended in
    with_question: Tensor = None  # (len,) log P(a_j | q, a_<j) of the policy
    without_question: Tensor = None  # (len,) log P(a_j | a_<j) of the policy
    frozen: Tensor = None  # (len,) log P(a_j | q, a_<j) of the frozen start
    values: Tensor = None  # (len,) of PPO's critic
    verdict: Verdict = None
    r_sa: Tensor = None  # ()
    reward: Tensor = None  # ()
    advantage: Tensor = None  # (); in PPO (len,), because every token has its own
    returns: Tensor = None  # (len,) what PPO's critic learns


def note(answers: list[Answer], **columns):
    """Set answers[i].NAME = columns[NAME][i]."""
    for name, values in columns.items():
        for answer, value in zip(answers, values, strict=True):
            setattr(answer, name, value)


def sample(model: GPT, tokenizer, problems: list[Problem], args, seed: int) -> list[Answer]:
    """--samples answers to each problem, adjacent, by all processes together; all get all of them.
    The different prompts, sorted by length, are dealt to the processes round robin."""
    n = args.samples
    prompts = [encode_prompt(tokenizer, problem.question) for problem in problems]
    rank, world = processes()
    different = sorted(sorted(set(map(tuple, prompts))), key=len)
    dealt = set(different[rank::world])
    mine = [i for i, prompt in enumerate(prompts) if tuple(prompt) in dealt]
    drawn = generate(model, [prompts[i] for i in mine], n=n, seed=seed, slots=args.slots,
                     max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                     stop=tokenizer.stop_ids)
    # Tokens and log-probs, with the length and `finished` behind them. float64 holds them exactly,
    # and adding the other processes' zeros changes nothing.
    table = torch.zeros(len(prompts), n, 2, args.max_new_tokens + 1, dtype=torch.float64)
    for k, r in enumerate(drawn):
        row = table[mine[k // n], k % n]
        row[:, :len(r.tokens)] = torch.tensor([r.tokens, r.logprobs], dtype=torch.float64)
        row[:, -1] = torch.tensor([len(r.tokens), r.finished])
    if world > 1:
        dist.all_reduce(table)
    answers, opening = [], opened_thinking(tokenizer)
    for k, (tokens, logprobs) in enumerate(table.flatten(0, 1)):
        length, finished = int(tokens[-1]), bool(logprobs[-1])
        ids = tokens[:length].long().tolist()
        text = opening + tokenizer.decode(ids[:-1] if finished else ids)
        answers.append(Answer(problems[k // n], prompts[k // n], ids, finished,
                              logprobs[:length].float(), text))
    return answers


def score(model, contexts: list[list], tokens: list[list], args, head=None) -> list[Tensor]:
    """The log-probs (len(t),) of each list of tokens after its context, by all processes together,
    at --temperature, without gradient; with a `head` what it returns (sar.score_answers)."""
    rank, world = processes()
    head = head or sar.logprob_head(model, args.temperature)
    home = next(model.parameters()).device
    if args.offload:  # the frozen start lies in host memory
        model.to(args.device)
    with autocast(args):
        pieces = sar.score_answers(model, contexts, tokens, head, micro_tokens=args.micro_tokens,
                                   rank=rank, world=world)
    if args.offload:
        model.to(home)
    if world == 1:
        return pieces
    reshard(model)
    lengths = [len(t) for t in tokens]
    flat = torch.cat([p if len(p) else torch.zeros(n) for p, n in zip(pieces, lengths)])
    dist.all_reduce(flat)
    return list(flat.split(lengths))


def score_with_gradient(model, micro: list[Answer], args, head=None):
    """log-prob and entropy (L,) of the answers' tokens; with a `head` what it returns instead."""
    with autocast(args):
        hidden, targets = sar.answer_hidden(model, [a.prompt for a in micro],
                                            [a.tokens for a in micro])
        if head:
            return head(hidden, targets)
        return sar.fused_logprob(hidden, model.unembedding, targets, temperature=args.temperature)


# ---- an update ----


def minibatches(answers: list[Answer], args, step: int) -> Iterator[list[Answer]]:
    """The answers of every optimizer step: --minibatch shuffled questions, --epochs times all."""
    n = args.samples
    for epoch in range(args.epochs):
        order = shuffled(args.prompts_per_step, f"{args.seed} {step} {epoch}")
        for first in range(0, args.prompts_per_step, args.minibatch):
            members = []
            for question in order[first:first + args.minibatch]:
                members += answers[question * n:(question + 1) * n]
            yield members


def micro_batches(answers: list[Answer], budget: int) -> Iterator[list[Answer]]:
    """This process's micro-batches; an empty one where others have work and it has none."""
    lengths = [len(a.prompt) + len(a.tokens) for a in answers]
    for batch in sar.micro_batches(lengths, budget, *processes()):
        yield [answers[i] for i in batch]


def concat(pieces: list[Tensor], args) -> Tensor:
    """One tensor on the device; (0,) of no pieces."""
    return torch.cat(pieces or [torch.empty(0)]).to(args.device)


class Means:
    """Sums, counts and maxima of what an update computes, over micro-batches and processes."""

    def __init__(self):
        self.table = {}  # name -> [sum, count, maximum]

    def add(self, **values: Tensor):
        """Every process must add the same names, also with tensors of no elements."""
        for name, value in values.items():
            row = self.table.setdefault(name, [0.0, 0, -float("inf")])
            if value.numel():
                row[0] += value.detach().sum().item()
                row[1] += value.numel()
                row[2] = max(row[2], value.detach().max().item())

    def gather(self) -> tuple[dict, dict, dict]:
        """Sums, means and maxima by name. A collective."""
        table = torch.tensor([*zip(*self.table.values())], dtype=torch.float64)  # (3, names)
        if processes()[1] > 1:
            dist.all_reduce(table[:2])
            dist.all_reduce(table[2], dist.ReduceOp.MAX)
        sums, counts, maxima = table
        columns = sums, sums / counts, maxima
        return tuple(dict(zip(self.table, column.tolist())) for column in columns)
