"""Talk to the model: it answers with a chat checkpoint and continues the text with a base one.

    python chat.py                       # from nothing: makes data, base and chat model first
    python chat.py out/base.npz --prompt "The capital of France"
    echo "What is the capital of France?" | python chat.py    # one answer a line

A chat model reads a question all in capitals in small letters, and a word that its training never
had as a frequent one that is a slip of the finger away; /probs shows that."""
import json, re, select, sys
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import gpt
import numpy as np
import sft
from sft import Message
from prepare import END, SPECIAL, InputError, printable, read_flags, run, setting, whole_file

HELP = """/reset forgets the conversation, /probs shows how sure it was of each token of its answer,
/better TEXT says what that should have been, /quit or Ctrl-D ends, Ctrl-C stops an answer.
Settings: /temperature, /top_k, /top_p, /repetition_penalty, /max_new_tokens, /seed; each takes a
value, as in /temperature 0.7. python chat.py --help tells what they are at first."""
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")  # settings of gpt.sample
SETTINGS = {*SAMPLING, "max_new_tokens", "seed"}  # that can be changed while it runs

@dataclass(frozen=True)
class Config:
    checkpoint: str = setting("", "nothing: out/chat.npz", nargs="?", positional=True)
    prompt: str = setting(None, "answer or continue this text and stop")
    temperature: float = setting(None, "0: the likeliest token; [0 to answer, else 0.8]", high=100)
    top_k: int = setting(0, "sample from the k likeliest tokens; 0 means all")
    top_p: float = setting(1.0, "sample from the likeliest that together are so probable", high=1)
    repetition_penalty: float = setting(1.0, "above 1: less of what was there", low=0.01, high=100)
    max_new_tokens: int = setting(200, "longest answer", low=1)
    seed: int = setting(0, "of the sampling: the same again gives the same text", high=2**32 - 1)

def prompt_ids(messages, tokenizer, block_size):
    """[question, answer, ..., question] -> ids ending in <|assistant|>. While the context has less
    than 24 tokens left for an answer, the oldest two messages are taken away, from the list too.
    Here a letter is a token: five messages have 18 tokens, three have 11, one has 4.

    >>> talk = [Message("user", "a"), Message("assistant", "b")] * 2 + [Message("user", "c")]
    >>> [prompt_ids(talk[:], gpt.Tokenizer([]), size) for size in (35, 34)]
    [[1, 35, 100, 2, 35, 101, 0, 1, 35, 102, 2], [1, 35, 102, 2]]
    """
    ids, _ = sft.render(messages, tokenizer)
    while len(ids) + 24 > block_size and len(messages) > 2:
        del messages[:2]
        ids, _ = sft.render(messages, tokenizer)
    if len(ids) > block_size:
        raise InputError(f"the question has {len(ids)} tokens, the context holds {block_size}")
    return ids

def load(path):
    """-> (reply, whether it is a chat model). reply(messages, cfg, seen) gives text piece by piece,
    never half a character: a chat model's answer or, of a base model, the last message and how it
    goes on. To seen it adds how probable each token was."""
    state, about, model, tokenizer = gpt.load_checkpoint(path)
    generate = gpt.make_generator(model)
    is_chat = about["kind"] == "chat"
    T = model.block_size

    def new_ids(ids, cfg, seen):
        rng = np.random.default_rng(cfg.seed)
        how = {name: getattr(cfg, name) for name in SAMPLING}
        if cfg.temperature is None:
            how["temperature"] = 0.0 if is_chat else 0.8
        for [id], [logits] in generate(state["params"], [ids], cfg.max_new_tokens, rng, **how):
            percent = 100 / np.exp(logits - logits[id]).sum()  # the softmax of that logit
            seen.append(f"{percent:6.1f} % {tokenizer.decode([id]) or SPECIAL[id]!r}")
            yield id

    def reply(messages, cfg, seen):
        text = messages[-1].text
        if is_chat:
            read = sft.as_read(text, about.get("words", {}))
            messages[-1] = Message("user", read)  # what /better will name, too
            ids = prompt_ids(messages, tokenizer, T)
            if read != text:
                seen.append(f"read as {read!r}")
        else:
            ids = [END, *tokenizer.encode(text)]  # a document begins with the text
        pieces = tokenizer.stream(new_ids(ids, cfg, seen))
        if is_chat:
            yield next(pieces, "").removeprefix(" ")  # render() puts a space before an answer
        else:
            yield text
        yield from pieces

    return reply, is_chat

def correct(messages, better, path):
    """Add what the last answer should have been to a file, whole or not at all, in the format of
    the library trl."""
    if not messages or not messages[-1].text or not better:
        raise InputError("/better TEXT says what the last answer should have been")
    *prompt, last = [{"role": role, "content": text} for role, text, _ in messages]
    line = {"prompt": prompt, "chosen": [last | {"content": better}], "rejected": [last]}
    lines = [*(path.read_bytes().splitlines() if path.exists() else []), json.dumps(line).encode()]
    with whole_file(path) as file:
        file.writelines(line + b"\n" for line in lines)
    question = printable(prompt[-1]["content"])
    print(f"{path}: {len(lines)} correction(s), the last of {question!r}; to learn from them:"
          f" python sft.py --dpo --out_dir {path.parent}, then"
          f" python chat.py {path.parent}/dpo.npz")

def typed():
    """What is typed at the prompt. Lines that arrive together, pasted, are one question, except for
    commands. Ctrl-C gives a new prompt, Ctrl-D ends."""
    while True:
        try:
            text = input("> ")
            with suppress(OSError):  # Windows cannot tell what has arrived
                while select.select([sys.stdin], [], [], 0.02)[0]:
                    text += "\n" + input()
            # A line that begins with "/", or as many lines as possible that do not.
            parts = re.findall(r"(?m)^/.*|(?:^[^/].*\n?)+", text)
            yield from filter(None, map(str.strip, parts))
        except KeyboardInterrupt:
            print()
        except EOFError:
            return print()

def converse(reply, cfg, feedback):
    """At a terminal: questions, commands, and settings with their new value. feedback: the file for
    corrections; a base model has none."""
    messages = []  # the conversation, without an answer that was stopped by Ctrl-C
    shown = []  # the same, with what was last shown, if only half: that is what /better corrects
    seen = []  # how sure it was of each token of that
    for line in typed():
        command, _, value = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/reset":
                messages, shown, seen = [], [], []
            elif command in ("/help", "/probs"):
                print(HELP if command == "/help" else "\n".join(seen) or "no answer was shown yet")
            elif command == "/better":
                if not feedback:
                    raise InputError("/better corrects answers; a base model only continues texts")
                correct(shown, value, feedback)
            elif command.startswith("/"):
                if command[1:] not in SETTINGS:
                    raise InputError(f"{command}: no command or setting; /help names them")
                new, given = read_flags(Config, [f"--{command[1:]}", value], __doc__)
                cfg = replace(cfg, **{name: getattr(new, name) for name in given})
            else:
                asked = [*messages, Message("user", line)]  # prompt_ids takes away what is too old
                shown, seen, said = [], [], ""
                for piece in reply(asked, cfg, seen):
                    print(printable(piece), end="", flush=True)
                    said += piece
                    shown = [*asked, Message("assistant", said)]
                print()
                messages = shown
        except (InputError, OSError, KeyboardInterrupt) as e:  # Ctrl-C says nothing
            print(e)

def answer_lines(reply, cfg):
    """Piped input: one answer a line, even where it is an error, and nothing else."""
    for number, line in enumerate(sys.stdin, 1):
        said = ""
        if "\ufffd" in line:
            print(f"standard input:{number}: not all of it is UTF-8", file=sys.stderr)
        try:
            if line.strip():
                said = "".join(reply([Message("user", line.strip())], cfg, []))
        except InputError as e:
            print(f"error: standard input:{number}: {e}", file=sys.stderr)
        print(printable(said).replace("\n", " "), flush=True)

def main(argv):
    cfg, _ = read_flags(Config, argv, __doc__)
    path = Path(cfg.checkpoint or "out/chat.npz")
    with redirect_stdout(sys.stderr):  # standard output is for answers only
        if not cfg.checkpoint:
            sft.make_if_missing(path)
    gpt.check_device()
    reply, is_chat = load(path)
    if cfg.prompt is not None:
        return print(printable("".join(reply([Message("user", cfg.prompt)], cfg, []))))
    if not sys.stdin.isatty():
        return answer_lines(reply, cfg)
    with suppress(ImportError):
        import readline  # noqa: F401  line editing and history at the prompt
    print(f"{path}: ask a question, or begin a text if it is a base model; /help for help")
    feedback = path.with_name("feedback.jsonl") if is_chat else None
    converse(reply, cfg, feedback)

if __name__ == "__main__":
    run(main)
