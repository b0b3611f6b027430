"""Prompts pulled from a shared counter against prompts dealt out evenly: how busy are the processes that sample?

    torchrun --standalone --nproc-per-node 4 -m bench.prompts

Busy is the CPU time that a process spends in the sampler. With a core (or GPU) for each process the rollouts take as long as the
busiest one, so slowest / mean is what raggedness costs; 1.00 is perfect. Two kinds of answers: the embedded model's (mostly 20 to 200
tokens), and geometric lengths of 128 tokens on average, at most 1,500, from a model with random weights and a few stop tokens.
"""
import time

import torch
import torch.distributed as dist

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
    rank, world = runtime.processes()
    tokenizer = Tokenizer.from_pretrained(TINY)
    prompts = [encode_prompt(tokenizer, p.question) for p in load_problems("tiny-test")[:PROMPTS]]
    trained = GPT.from_pretrained(TINY)
    torch.manual_seed(0)
    untrained = GPT(GPTConfig.from_hf(trained.config.hf | {"max_position_embeddings": 2048}))
    if rank == 0:
        print(f"{world} processes, {PROMPTS} prompts, {N} answers each\n\n| answers | mean tokens | longest | prompts | slowest / mean busy | tokens |")
        print("|---|---|---|---|---|---|")
    for name, model, stop, limit in (("embedded model", trained, tokenizer.stop_ids, 256),
                                     ("geometric", untrained, set(range(0, 25, 5)), 1500)):
        for way in ("dealt", "pulled"):
            busy, tokens, longest = [], [], 0
            for seed in range(3):
                share = PROMPTS * N // world
                mine = iter([*range(rank, PROMPTS, world), PROMPTS])
                counter = f"{name} {way} {seed}"
                take = (lambda: next(mine)) if way == "dealt" else (lambda: runtime.store.add(counter, 1) - 1)
                dist.barrier()
                began = time.process_time()
                answers = generate(model, prompts, n=N, max_new_tokens=limit, stop=stop, seed=seed, take=take, at_once=share // 2)
                figures = torch.zeros(world, 2, dtype=torch.float64)
                figures[rank] = torch.tensor([time.process_time() - began, sum(len(a.tokens) for a in answers)])
                most = torch.tensor(max(len(a.tokens) for a in answers))
                dist.all_reduce(figures)
                dist.all_reduce(most, dist.ReduceOp.MAX)
                busy.append((figures[:, 0].max() / figures[:, 0].mean()).item())
                tokens.append((figures[:, 1].max() / figures[:, 1].mean()).item())
                mean, longest = figures[:, 1].sum().item() / PROMPTS / N, max(longest, most.item())
            if rank == 0:
                print(f"| {name} | {mean:.0f} | {longest} | {way} | {sum(busy) / 3:.3f} | {sum(tokens) / 3:.3f} |", flush=True)


if __name__ == "__main__":
    main()
