"""The greedy answers of several models to one question, with their lengths.

    python -m view.answers tiny runs/NAME/step_000140 --question "Tom has 3 cups. ..."
"""
import textwrap

from data.prompts import encode_prompt
from data.tiny_world import tiny_problems
from model import GPT
from rollout import generate
from runtime.errors import user_errors
from runtime.settings import Parser, open_model, positive_int, prompt_flags


def main(argv: list[str] | None = None) -> None:
    parser = Parser("The greedy answers of several models to one question, with their lengths.")
    parser.add_argument("models", nargs="+", help="model folders or names")
    parser.add_argument("--question", default=tiny_problems("test")[32][0],
                        help="(default: a held-out problem of the embedded model)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=256, help="(default: 256)")
    prompt_flags(parser)
    args = parser.parse_args(argv)
    print(textwrap.fill(args.question, 96))
    for name in args.models:
        folder, tokenizer = open_model(name, args)
        prompt = encode_prompt(tokenizer, args.question)
        model = GPT.from_pretrained(folder, length=len(prompt) + args.max_new_tokens)
        answer, = generate(model, [prompt], max_new_tokens=args.max_new_tokens,
                           stop=tokenizer.stop_ids, temperature=0)
        print(f"\n{name}: {len(answer.tokens)} tokens")
        text = tokenizer.decode(answer.tokens[:-1] if answer.finished else answer.tokens)
        for line in text.splitlines():
            print(textwrap.fill(line, 96))


if __name__ == "__main__":
    with user_errors():
        main()
