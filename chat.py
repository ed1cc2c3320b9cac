"""Talk to the model: it answers with a chat checkpoint and continues the text with a base checkpoint.

    python chat.py                            # from nothing: makes data, base and chat model first, 2 to 5 minutes
    python chat.py out/base.npz --prompt "The capital of France"
    echo "What is the capital of France?" | python chat.py      # one answer a line

At the prompt: /help, /reset, /probs, /quit, and each setting by its name, such as /temperature 0.7. Ctrl-C stops an
answer.
"""
import contextlib
import dataclasses
import pathlib
import sys

import gpt
import numpy as np
import sft
from prepare import END, SPECIAL, InputError, printable, read_flags, run, setting


@dataclasses.dataclass(frozen=True)
class Config:
    checkpoint: str = setting("", "nothing: out/chat.npz", nargs="?", positional="checkpoint", metavar="CKPT")
    prompt: str = setting("", "answer or continue this text and stop", metavar="TEXT")
    temperature: float = setting(None, "0 takes the likeliest token, 1 samples as trained"
                                 " [0 to answer, 0.8 to continue]", high=100.0)
    top_k: int = setting(0, "sample from the k likeliest tokens; 0 means all")
    top_p: float = setting(1.0, "sample from the likeliest tokens that together have this probability", high=1.0)
    repetition_penalty: float = setting(1.0, "above 1 makes tokens that were there less likely", low=0.01, high=100.0)
    max_new_tokens: int = setting(200, "longest answer", low=1, high=1 << 20)
    seed: int = setting(0, "of the sampling", high=2**32 - 1)


def prompt_ids(turns, tokenizer, block_size, room=24):
    """[question, answer, ..., question] -> ids ending in <|assistant|>; the oldest turns go, whole, until `room` tokens
    for the answer are left in the context."""
    ids, _ = sft.render(turns, tokenizer)
    while len(ids) + room > block_size and len(turns) > 1:
        turns = turns[2:]
        ids, _ = sft.render(turns, tokenizer)
    if len(ids) > block_size:
        raise InputError(f"the question has {len(ids)} tokens, the context holds {block_size}; ask a shorter one")
    return ids


def show_probabilities(seen, tokenizer):
    """One line a token: its probability as a bar, and the token that came second."""
    name = lambda id: SPECIAL[id] if id < len(SPECIAL) else printable(tokenizer.decode([id])).replace("\n", "\\n")
    for id, p, second, q in seen:
        print(f"{name(id):<16} {100 * p:5.1f} % {'#' * round(20 * p):<20}  second: {name(second)} {100 * q:.1f} %")


def main(argv):
    cfg, _ = read_flags(Config, argv, __doc__)
    path = pathlib.Path(cfg.checkpoint or "out/chat.npz")
    if not cfg.checkpoint:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for answers only
            gpt.make_if_missing(path, sft.main)
    state, about, model, tokenizer = gpt.load_checkpoint(path)
    generate, rng, answers = gpt.make_generator(model), np.random.default_rng(cfg.seed), about["kind"] == "chat"
    if cfg.temperature is None:
        cfg = dataclasses.replace(cfg, temperature=0.0 if answers else 0.8)
    seen = []  # of the last answer, for each token: itself, its probability, the likeliest other, its probability

    def choose(_, logits, history):
        id = gpt.sample(logits, history, rng, cfg.temperature, cfg.top_k, cfg.top_p, cfg.repetition_penalty)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        others = np.where(np.arange(len(p)) == id, -1, p)
        seen.append((id, p[id], others.argmax(), others.max()))
        return id

    def reply(turns):
        """The conversation so far -> pieces of text as they are made, never half a character, nothing that steers a
        terminal. A base model gets the last turn only and continues it."""
        seen.clear()
        ids = prompt_ids(turns, tokenizer, model.block_size) if answers else [END, *tokenizer.encode(turns[-1])]
        steps = generate(state["params"], [ids], choose, cfg.max_new_tokens)
        pieces = map(printable, tokenizer.stream(step[0] for step in steps))
        if answers:
            yield next(pieces, "").removeprefix(" ")
        else:
            yield printable(turns[-1])
        yield from pieces

    if cfg.prompt:
        return print("".join(reply([cfg.prompt])))
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin, 1):
            answer = ""  # even for an error one line for each line
            try:
                answer = "".join(reply([line.strip()])).replace("\n", " ")
            except InputError as e:
                print(f"error: standard input:{number}: {e}", file=sys.stderr)
            print(answer, flush=True)
        return

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history at the prompt
    print(f"{path}: {'ask a question' if answers else 'begin a text'}; /help for help")
    turns = []
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        command, _, value = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            turns = []
        elif command == "/probs":
            show_probabilities(seen, tokenizer)
        elif command == "/help":
            print("/reset forgets the conversation, /probs shows how sure the last answer was, /quit or Ctrl-D ends;"
                  " Ctrl-C stops an answer. Settings:")
            for f in dataclasses.fields(cfg)[2:]:  # not the checkpoint, not the prompt
                print(f"/{f.name} {getattr(cfg, f.name)}  ({f.metadata['help']})")
        elif line.startswith("/"):
            try:
                changed, given = read_flags(Config, [f"--{command[1:]}", value.strip()], __doc__)
                cfg = dataclasses.replace(cfg, **{name: getattr(changed, name) for name in given})
                rng = np.random.default_rng(cfg.seed)  # so that answers before and after can be compared
            except InputError as e:
                print(str(e).replace("--help", "/help").replace("--", "/"))
        elif line:
            said = ""
            try:
                for piece in reply([*turns, line]):
                    said += piece
                    print(piece, end="", flush=True)
            except (InputError, KeyboardInterrupt) as e:
                print(e, end="")
            print()
            if said:
                turns += [line, said]


if __name__ == "__main__":
    run(main)
