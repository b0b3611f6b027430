"""Renders chat templates, which are programs from outside, in a process of its own (prompts.py).

A line in is JSON, [template, variables]; a line out is [text, what is wrong]. The process ends when
a template takes more than 5 seconds or, where the system can limit it, a gigabyte.
"""
import contextlib
import faulthandler
import json
import re
import sys
import time

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 1_000_000  # characters; more is no prompt


def refuse(message):
    raise jinja2.TemplateError(message)


def to_json(value, **options):
    return json.dumps(value, **{"ensure_ascii": False} | options)


# As transformers has it. {% generation %} only marks what is trained on.
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
environment.filters["tojson"] = to_json
environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}


def render(template: str, variables: dict) -> str:
    template = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", template)
    template = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", template)
    text = environment.from_string(template).render(variables)
    if len(text) > LONGEST:
        raise ValueError(f"it prints {len(text)} characters")
    return text


if __name__ == "__main__":
    with contextlib.suppress(ImportError, ValueError):
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    for line in sys.stdin:
        faulthandler.dump_traceback_later(5, exit=True)
        try:
            reply = [render(*json.loads(line)), ""]
        except Exception as error:
            reply = ["", f"{type(error).__name__}: {error}"]
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), flush=True)
