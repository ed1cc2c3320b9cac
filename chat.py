"""Talk to the model: it answers with a chat checkpoint and continues the text with a base one.

    python chat.py                       # from nothing: makes data, base and chat model first
    python chat.py out/base.npz --prompt "The capital of France"
    echo "What is the capital of France?" | python chat.py    # one answer a line

At the prompt: /help, /reset, /probs, /better TEXT, /quit, and each setting by its name, such as
/temperature 0.7. Ctrl-C stops an answer, Ctrl-D ends.
"""
import contextlib
import dataclasses
import json
import pathlib
import re
import select
import sys
import zlib

import gpt
import numpy as np
import sft
from prepare import END, InputError, printable, read_flags, run, setting, whole_file

HELP = """/reset forgets the conversation, /probs shows how sure the last answer was, /better TEXT
says what it should have been, /quit or Ctrl-D ends, Ctrl-C stops an answer. Settings:"""


@dataclasses.dataclass(frozen=True)
class Config:
    checkpoint: str = setting("", "nothing: out/chat.npz", nargs="?", positional="checkpoint")
    prompt: str = setting(None, "answer or continue this text and stop")
    temperature: float = setting(None, "0 takes the likeliest token, 1 samples as trained"
                                 " [0 to answer, 0.8 to continue]", high=100)
    top_k: int = setting(0, "sample from the k likeliest tokens; 0 means all")
    top_p: float = setting(1.0, "sample from the likeliest tokens that together have this"
                           " probability", high=1)
    repetition_penalty: float = setting(1.0, "above 1 makes tokens that were there less likely",
                                        low=0.01, high=100)
    max_new_tokens: int = setting(200, "longest answer", low=1)
    seed: int = setting(0, "of the sampling", high=2**32 - 1)


def prompt_ids(messages, tokenizer, block_size, room=24):
    """[question, answer, ..., question] -> ids ending in <|assistant|>; the oldest turns go, whole,
    until `room` tokens for the answer are left in the context."""
    ids, _ = sft.render(messages, tokenizer)
    if len(ids) + room > block_size and len(messages) > 1:
        return prompt_ids(messages[2:], tokenizer, block_size, room)
    if len(ids) > block_size:
        raise InputError(f"the question has {len(ids)} tokens, the context holds {block_size};"
                         " ask a shorter one")
    return ids


class Talk:
    """A model, the settings of the sampling, and the conversation so far."""

    def __init__(self, path, cfg):
        state, about, self.model, self.tokenizer = gpt.load_checkpoint(path)
        self.params, self.answers, self.messages = state["params"], about["kind"] == "chat", []
        self.generate = gpt.make_generator(self.model)
        self.feedback = path.with_name("feedback.jsonl")
        self.set(cfg)
        base = path.with_name("base.npz")
        if self.answers and base.exists():
            if zlib.crc32(gpt.load_checkpoint(base)[0]["params"]["wte"]) != about["base"]:
                print(f"{path} comes from another base than {base} is now; python sft.py makes one"
                      " that does", file=sys.stderr)

    def set(self, cfg):
        """New settings; the same seed again, so that answers before and after can be compared."""
        if cfg.temperature is None:
            cfg = dataclasses.replace(cfg, temperature=0.0 if self.answers else 0.8)
        self.cfg, self.rng, self.seen = cfg, np.random.default_rng(cfg.seed), []

    def choose(self, row, logits, history):
        id = gpt.sample(logits, history, self.rng, self.cfg.temperature, self.cfg.top_k,
                        self.cfg.top_p, self.cfg.repetition_penalty)
        self.seen.append((id, logits))
        return id

    def reply(self, text):
        """Pieces of text as they are made, never half a character. A base model continues the
        text; a chat model answers, and what it said becomes part of the conversation."""
        messages, said, self.seen = [*self.messages, ("user", text, False)], "", []
        if self.answers:
            ids = prompt_ids(messages, self.tokenizer, self.model.block_size)
        else:
            ids = [END, *self.tokenizer.encode(text)]
            yield text
        steps = self.generate(self.params, [ids], self.choose, self.cfg.max_new_tokens)
        try:
            for piece in self.tokenizer.stream(step[0] for step in steps):
                if self.answers and not said:
                    piece = piece.removeprefix(" ")
                said += piece
                yield piece
        finally:  # also when Ctrl-C stops the answer
            if self.answers:
                self.messages = [*messages, ("assistant", said, True)]

    def show_probabilities(self):
        """A line for each token of the last answer: its probability, and what came second."""
        for id, logits in self.seen:
            p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            second = np.argsort(-np.where(np.arange(len(p)) == id, 0, p))[0]
            name, other = (printable(self.tokenizer.decode([i])) or "(end)" for i in (id, second))
            print(f"{name!r:<18}{100 * p[id]:6.1f} %   second: {other!r} {100 * p[second]:.1f} %")

    def correct(self, text):
        """/better: add what the last answer should have been to feedback.jsonl, whole or not at
        all, in the format of trl's preferences."""
        if not (self.messages and text):
            raise InputError("/better TEXT says what the last answer should have been")
        turns = [{"role": role, "content": said} for role, said, _ in self.messages]
        line = {"prompt": turns[:-1], "chosen": [{"role": "assistant", "content": text}],
                "rejected": turns[-1:]}
        old = self.feedback.read_bytes() if self.feedback.exists() else b""
        with whole_file(self.feedback) as file:
            file.write(old + json.dumps(line).encode() + b"\n")
        print(f"{self.feedback}: {old.count(10) + 1} correction(s); to learn from them:"
              " python sft.py --dpo, then python chat.py out/dpo.npz")

    def command(self, line):
        """/name value: a command, or a setting and its new value."""
        name, _, value = line[1:].partition(" ")
        if name == "reset":
            self.messages = []
        elif name == "probs":
            self.show_probabilities()
        elif name == "better":
            self.correct(value.strip())
        elif name == "help":
            print(HELP)
            for f in dataclasses.fields(Config)[2:]:  # not the checkpoint, not the prompt
                print(f"/{f.name} {getattr(self.cfg, f.name)}  ({f.metadata['help']})")
        else:
            new, given = read_flags(Config, [f"--{name}", value.strip()], __doc__)
            new = {name: getattr(new, name) for name in given}
            self.set(dataclasses.replace(self.cfg, **new))


def questions():
    """What is typed at the prompt. Lines that arrive together, pasted, are one question, except for
    commands. Ctrl-C gives a new prompt, Ctrl-D ends."""
    ended = False
    while not ended:
        text = ""
        try:
            text = input("> ")
            with contextlib.suppress(OSError):  # Windows cannot tell what has arrived
                while select.select([sys.stdin], [], [], 0.02)[0]:
                    text += "\n" + input()
        except (KeyboardInterrupt, EOFError) as e:
            ended = isinstance(e, EOFError)
            print()
        yield from map(str.strip, re.findall(r"^/.*|(?:^[^/].*\n?)+", text, re.M))


def answer_lines(talk):
    """Piped input: one answer a line, even where it is an error, and nothing else."""
    for number, line in enumerate(sys.stdin, 1):
        talk.messages, answer = [], ""
        if "\ufffd" in line:
            print(f"standard input:{number}: not all of it is UTF-8", file=sys.stderr)
        try:
            answer = "".join(talk.reply(line.strip()))
        except InputError as e:
            print(f"error: standard input:{number}: {e}", file=sys.stderr)
        print(printable(answer).replace("\n", " "), flush=True)


def main(argv):
    cfg, _ = read_flags(Config, argv, __doc__)
    path = pathlib.Path(cfg.checkpoint or "out/chat.npz")
    if not cfg.checkpoint:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for answers only
            sft.make_if_missing(path, sft.main)
    gpt.check_device()
    talk = Talk(path, cfg)
    if cfg.prompt is not None:
        return print(printable("".join(talk.reply(cfg.prompt))))
    if not sys.stdin.isatty():
        return answer_lines(talk)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history at the prompt
    print(f"{path}: {'ask a question' if talk.answers else 'begin a text'}; /help for help")
    for line in questions():
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                talk.command(line)
            else:
                for piece in talk.reply(line):
                    print(printable(piece), end="", flush=True)
                print()
        except InputError as e:
            print(str(e).replace("--", "/"))
        except KeyboardInterrupt:
            print()  # the answer ends here


if __name__ == "__main__":
    run(main)
