"""Prompts pulled from a shared counter against prompts dealt out evenly: how busy are the processes that sample?

    torchrun --standalone --nproc-per-node 4 -m bench.prompts

A process is busy from the common start until its last answer ends; the rollouts take as long as the slowest, so slowest / mean is what
raggedness costs, and 1.00 is perfect. Two kinds of answers: the embedded model's (mostly 20 to 200
tokens), and geometric lengths of 128 tokens on average, at most 1,000, from a model with random weights and a few stop tokens.
"""

import functools
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

import runtime
from data.hub import TINY
from data.problems import load_problems
from data.prompts import encode_prompt
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from rollout import generate

PROMPTS, N = 64, 4


def main() -> None:
    runtime.join_processes()
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    rank, world = runtime.processes()
    tokenizer = Tokenizer.from_pretrained(TINY)
    prompts = [encode_prompt(tokenizer, p.question) for p in load_problems("tiny-test")[:PROMPTS]]
    trained = GPT.from_pretrained(TINY)
    torch.manual_seed(0)
    untrained = GPT(GPTConfig.from_hf(trained.config.hf | {"max_position_embeddings": 2048}))
    if rank == 0:
        print(f"{world} processes, {PROMPTS} prompts, {N} answers each\n")
        print("| answers | mean tokens | longest | prompts | slowest / mean | seconds |")
        print("|---|---|---|---|---|---|")
    for name, model, stop, limit in (
        ("embedded model", trained, tokenizer.stop_ids, 256),
        ("geometric", untrained, set(range(0, 25, 5)), 1000),
    ):
        for way in ("dealt", "pulled"):
            busy, seconds, longest = [], [], 0
            for seed in range(3):
                share = PROMPTS * N // world
                mine = iter([*range(rank, PROMPTS, world), PROMPTS])
                counter = f"{name} {way} {seed}"
                take = (
                    (lambda: next(mine))
                    if way == "dealt"
                    else (lambda: runtime.store.add(counter, 1) - 1)
                )
                dist.barrier()
                began = time.perf_counter()
                answers = generate(
                    model,
                    prompts,
                    n=N,
                    max_new_tokens=limit,
                    stop=stop,
                    seed=seed,
                    take=take,
                    at_once=share // 2,
                )
                figures = torch.zeros(world, 2, dtype=torch.float64)
                figures[rank] = torch.tensor(
                    [time.perf_counter() - began, sum(len(a.tokens) for a in answers)]
                )
                most = torch.tensor(max(len(a.tokens) for a in answers))
                dist.all_reduce(figures)
                dist.all_reduce(most, dist.ReduceOp.MAX)
                busy.append((figures[:, 0].max() / figures[:, 0].mean()).item())
                seconds.append(figures[:, 0].max().item())
                mean, longest = figures[:, 1].sum().item() / PROMPTS / N, max(longest, most.item())
            if rank == 0:
                print(
                    f"| {name} | {mean:.0f} | {longest} | {way} | {sum(busy) / 3:.3f} | {sum(seconds) / 3:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
