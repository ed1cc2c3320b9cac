"""Supervised fine-tuning: from a model that continues text to one that answers. Then DPO.

    python sft.py                        # the built-in questions, out/base.npz -> out/chat.npz
    python sft.py mine.jsonl --eval held_out.jsonl
    python sft.py --show 3               # three examples, the trained tokens in colour, then stop
    python sft.py --eval questions.jsonl # no training: how many answers of out/chat.npz are right
    python sft.py --dpo                  # what people corrected in the chat, out/chat.npz -> dpo.npz

Pretraining gave the model its knowledge; here it learns the manner. The loop is that of gpt.py, but
only the tokens of answers have weight. Reading order: records, examples, answers and their marks,
fine-tuning, DPO, main.
"""
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import zlib

import gpt
import jax
import jax.numpy as jnp
import numpy as np
import prepare
from data.world import DONT_KNOW
from prepare import ASSISTANT, END, SPECIAL, USER, InputError, Tokenizer, count, printable
from prepare import read_flags, report, run, setting, show_progress

# ---------------------------------------------------------------- records: JSON of many shapes

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system", "developer": "system"}
QUESTION = ("prompt", "instruction", "text", "input", "context")  # all there are make the question
ANSWER = [("messages", "conversations", "response", "output", "completion")]  # the first there is
PREFERENCE = [("chosen",), ("rejected",)]


def read_json(path, odd):
    """JSON lines or one JSON list -> (record, "file:line")."""
    lines = [(line, source) for line, source in prepare.read_lines(path, odd) if line.strip()]
    if lines and lines[0][0].lstrip().startswith("["):
        try:
            records = json.loads("".join(line for line, _ in lines))
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}: not JSON ({e})") from None
        yield from ((record, f"{path}: record {i}") for i, record in enumerate(records, 1))
        return
    for line, source in lines:
        try:
            yield json.loads(line), source
        except (ValueError, RecursionError):
            count(odd, "lines that are not JSON", source)


def turns_of(record, names):
    """A record of any shape -> its turns as dicts. names: what its answer, or the whole
    conversation, may be called. A text that is an answer follows the question."""
    turns = next((record[name] for name in names if name in record), None)
    asked = [record[name] for name in QUESTION if record.get(name)]
    if asked and not isinstance(asked[0], list):
        asked = [[{"role": "user", "content": "\n\n".join(asked)}]]
    if isinstance(turns, str):
        turns = [{"role": "assistant", "content": turns}]
    if asked and turns[0].get("role") == "assistant":
        turns = asked[0] + turns
    return turns


def messages_of(turns):
    """OpenAI's [{"role", "content"}, ...] or ShareGPT's [{"from", "value"}, ...] -> [(role, text,
    trained), ...] going user, assistant, user, assistant. A system text goes before the first
    question; a last question without an answer goes; an answer of "weight" 0 is not trained."""
    messages, system = [], ""
    for turn in turns:
        role = ROLES.get(turn.get("role", turn.get("from")), "other")
        text = turn.get("content", turn.get("value"))
        if isinstance(text, list):
            text = "".join(part["text"] for part in text)
        text = "\n\n".join(part for part in (system, text) if part != "")
        system = ""
        if role == "system" and not messages:
            system = text
            continue
        if role != ("user", "assistant")[len(messages) % 2] or turn.get("tool_calls"):
            raise ValueError("whose turns are not user, assistant, user, assistant")
        if role == "assistant" and not text.strip():
            raise ValueError("with an empty answer")
        messages.append((role, text, role == "assistant" and turn.get("weight", 1) != 0))
    return messages[:len(messages) // 2 * 2]


def conversations(path, odd, kind=ANSWER):
    """A file -> (messages for each answer, record, "file:line"). What cannot be a conversation is
    left out and counted in odd. What both answers of a preference share is not trained."""
    for record, source in read_json(path, odd):
        try:
            found = [messages_of(turns_of(record, names)) for names in kind]
            shared = set.intersection(*map(set, found)) if len(found) > 1 else set()
            found = [[(*m[:2], m[2] and m not in shared) for m in messages] for messages in found]
            if not all(any(trained for *_, trained in messages) for messages in found):
                raise ValueError("without an answer to train")
            yield found, record, source
        except ValueError as e:
            count(odd, f"records {e}", source)
        except (AttributeError, IndexError, KeyError, TypeError):  # anything can be in a JSON file
            count(odd, "records of no known shape", source)


# ---------------------------------------------------------------- examples


def render(messages, tokenizer):
    """Messages -> (ids, which of them are trained):

        [("user", "hi", False), ("assistant", "ho", True)]
        ->  <|user|>  hi  <|assistant|>  ho   <|end|>
            False     ..  False          True True

    Put together from ids, so that no text can forge a special token. A text is encoded with a space
    before it: its first word is then the same token as within a text. Messages that end in a
    question end in <|assistant|>: the prompt of chat.py."""
    ids, trained = [], []
    for role, text, is_trained in messages:
        words = tokenizer.encode(f" {text}")
        ids += [*words, END] if role == "assistant" else [USER, *words, ASSISTANT]
        trained += [is_trained] * (len(ids) - len(trained))
    return ids, trained


def read_examples(paths, tokenizer, T, kind=ANSWER):
    """Files -> examples: for each record that fits the context, (ids, trained) of each answer."""
    odd, examples = {}, []
    for path in paths:
        for found, _, source in conversations(path, odd, kind):
            example = [render(messages, tokenizer) for messages in found]
            if max(len(ids) for ids, _ in example) > T:
                count(odd, f"records longer than the context of {T} tokens", source)
                continue
            examples.append([(np.array(ids, np.uint16), np.array(w)) for ids, w in example])
    report(odd)
    if not examples:
        raise InputError(f"{path}: nothing to train on is left")
    return examples


def show(ids, trained, tokenizer):
    """The example as text; what is trained stands out."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    text = ""
    for is_trained, part in itertools.groupby(zip(ids.tolist(), trained), lambda pair: pair[1]):
        words = ""
        for is_special, run in itertools.groupby((i for i, _ in part), lambda i: i < len(SPECIAL)):
            words += "".join(SPECIAL[i] for i in run) if is_special else tokenizer.decode(run)
        text += f"{on}{printable(words)}{off}" if is_trained else printable(words)
    return text


def shift(ids, trained, T):
    """shift([5, 6, 7], [False, False, True], 4) -> x [5, 6, 0, 0], y [6, 7, 0, 0], w [0, 1, 0, 0]:
    w is 1 where the *target* y is trained."""
    row = np.zeros((3, T), np.int32)
    row[:, : len(ids) - 1] = ids[:-1], ids[1:], trained[1:]
    return row


def epoch_order(total, n, seed, number):
    """Which n of `total` examples make the number-th batch: in an epoch each comes once, in an
    order of its own."""
    first, start = divmod(number * n, total)
    epochs = range(first, first + (start + n - 1) // total + 1)
    order = [np.random.default_rng([seed, epoch]).permutation(total) for epoch in epochs]
    return np.concatenate(order)[start:start + n]


# ---------------------------------------------------------------- answers and their marks


def answer_all(params, cfg, tokenizer, prompts, longest, temperature=0.0):
    """Answers to prompts (lists of ids), 64 at a time -> [text]."""
    generate, rng, answers = gpt.make_generator(cfg), np.random.default_rng(cfg.seed), []

    def choose(row, logits, history):
        return gpt.sample(logits, history, rng, temperature)

    for start in range(0, len(prompts), 64):
        some = prompts[start:start + 64]
        padding = [[END]] * (64 - len(some))  # batches of one size: compiled once
        steps = list(generate(params, some + padding, choose, longest))
        for i in range(len(some)):
            ids = [step[i] for step in steps if step[i] is not None]
            answers.append(tokenizer.decode(ids).removeprefix(" "))
        show_progress(f"answering: {len(answers)} of {len(prompts)}",
                      last=len(answers) == len(prompts))
    return answers


def grade(params, cfg, tokenizer, test, column):
    """Answer greedily; record[column] becomes "right" (the whole answer, word for word),
    "declined" or "wrong". A record with a "text" is a text to complete.

    test: [(messages, record)]"""
    prompts = [render(messages[:-1], tokenizer)[0] for messages, _ in test]
    for i, (messages, record) in enumerate(test):
        if "text" in record:
            prompts[i] = [END, *tokenizer.encode(record["text"])]
    longest = max(len(tokenizer.encode(messages[-1][1])) for messages, _ in test) + 8
    said = answer_all(params, cfg, tokenizer, prompts, longest)
    for (messages, record), answer in zip(test, said):
        expected = messages[-1][1].strip()
        right = answer.startswith(expected) if "text" in record else answer == expected
        record[column] = "declined" if answer == DONT_KNOW else "right" if right else "wrong"


def table(test, columns):
    """Print for each set of questions how many % of the answers were right, declined, wrong."""
    print(f"{'set':<24}{'questions':>10}{'right':>18}{'declined':>18}{'wrong':>18}")
    sets = {}
    for _, record in test:
        sets.setdefault(printable(str(record.get("set", "all"))), []).append(record)
    for name, records in sets.items():
        cells = ""
        for verdict in ("right", "declined", "wrong"):
            parts = [100 * np.mean([r[column] == verdict for r in records]) for column in columns]
            cells += f"{' -> '.join(f'{part:.1f}' for part in parts):>18}"
        print(f"{name:<24}{len(records):>10}{cells}")


def log_probs_of(losses, params, examples, T, n=32):
    """losses: gpt.token_losses, compiled -> the log-probability of what is trained in each of the
    examples [(ids, trained)]."""
    found = []
    for start in range(0, len(examples), n):
        rows = [shift(*example, T) for example in examples[start:start + n]]
        x, y, w = np.resize(rows, (n, 3, T)).swapaxes(0, 1)  # one size: compiled once
        found += (-(losses(params, x, y) * w).sum(-1)[:len(rows)]).tolist()
    return np.array(found)


# ---------------------------------------------------------------- fine-tuning


def imitate(cfg, examples, held, tokenizer):
    """Make answers likelier. The first `held` examples are not trained on -> objective, batch_at
    and validate for gpt.train, and measure(params) -> {name: value}."""
    T, data_dir, old, replay = cfg.block_size, pathlib.Path(cfg.data_dir), 0, None
    kept, rest = [e[0] for e in examples[:held]], [e[0] for e in examples[held:]]
    losses = jax.jit(functools.partial(gpt.token_losses, cfg=cfg))
    validate = lambda params: ("", "")
    source = data_dir / "tokenizer.json"
    if source.exists() and Tokenizer.load(source).merges == tokenizer.merges:
        replay = gpt.load_tokens(data_dir / "train.bin", tokenizer, T + 1)
        old = min(cfg.batch_size - 1, round(cfg.batch_size * cfg.replay))
        val = gpt.load_tokens(data_dir / "val.bin", tokenizer, 2)
        validate = gpt.make_validation(val, tokenizer, cfg)
    else:
        print(f"{data_dir} is not the text of {cfg.init}, so none of it is replayed")

    def batch_at(number):
        """Examples, and rows of pretraining text against forgetting (arXiv 2503.21676)."""
        some = epoch_order(len(rest), cfg.batch_size - old, cfg.seed, number)
        x, y, w = np.array([shift(*rest[i], T) for i in some]).swapaxes(0, 1)
        if old:
            replayed = gpt.random_batch(replay, old, T, cfg.seed, number)
            x, y, w = (np.concatenate(pair) for pair in zip((x, y, w), replayed))
        return x, y, np.float32(w)

    def measure(params):
        if not kept:
            return {}
        tokens = sum(trained[1:].sum() for _, trained in kept)
        return {"loss of held-out answers": -log_probs_of(losses, params, kept, T).sum() / tokens}

    return functools.partial(gpt.loss, cfg=cfg), batch_at, validate, measure


# ---------------------------------------------------------------- DPO


def dpo_loss(params, batch, key, cfg, anchor=1.0):
    """Direct preference optimisation (arXiv 2305.18290, eq. 7) -> (sum, count). batch: x, y, w
    (n, 2, T), the chosen answer first, and the log-probabilities (n, 2) that the model before
    training, the reference, gave them.

    `anchor` times the loss per token of the chosen answer is added: its probability would otherwise
    fall along with that of the rejected one (arXiv 2404.19733)."""
    x, y, w, reference = batch
    n, _, T = x.shape
    losses = gpt.token_losses(params, x.reshape(2 * n, T), y.reshape(2 * n, T), cfg)
    logp = -(losses.reshape(n, 2, T) * w).sum(-1)
    chosen, rejected = (cfg.beta * (logp - reference)).T
    loss = -jax.nn.log_sigmoid(chosen - rejected) - anchor * logp[:, 0] / w[:, 0].sum(-1)
    return loss.sum(), jnp.float32(n)


def prefer(cfg, examples, held, tokenizer):
    """Make chosen answers likelier than rejected ones: as imitate."""
    T, losses = cfg.block_size, jax.jit(functools.partial(gpt.token_losses, cfg=cfg))
    reference_params = gpt.load_checkpoint(cfg.init)[0]["params"]

    def log_probs(params, pairs):
        flat = [answer for pair in pairs for answer in pair]
        return log_probs_of(losses, params, flat, T).reshape(-1, 2)

    reference = np.float32(log_probs(reference_params, examples))

    def batch_at(number):
        some = held + epoch_order(len(examples) - held, cfg.batch_size, cfg.seed, number)
        rows = [[shift(*answer, T) for answer in examples[i]] for i in some]
        x, y, w = np.array(rows).transpose(2, 0, 1, 3)
        return x, y, np.float32(w), reference[some]

    def measure(params):
        if not held:
            return {}
        chosen, rejected = (cfg.beta * (log_probs(params, examples[:held]) - reference[:held])).T
        return {"DPO loss, held out": np.logaddexp(0, rejected - chosen).mean(),
                "chosen preferred, %": 100 * (chosen > rejected).mean(),
                "reward of the chosen": chosen.mean(), "reward of the rejected": rejected.mean()}

    def validate(params):
        return measure(params).get("DPO loss, held out", ""), ""

    return functools.partial(dpo_loss, cfg=cfg), batch_at, validate, measure


def built_in_preferences(cfg, tokenizer, n=300):
    """Examples from the built-in questions: where the answer is known it is chosen and "I do not
    know that." rejected; where it is not, that is chosen and what the model makes up rejected."""
    params = gpt.load_checkpoint(cfg.init)[0]["params"]
    questions = [messages for [messages], *_ in conversations(f"{cfg.data_dir}/qa.jsonl", {})]
    order = np.random.default_rng(cfg.seed).permutation(len(questions))
    questions = [questions[i] for i in order if len(questions[i]) == 2]
    known = [m for m in questions if m[1][1] != DONT_KNOW][:n]
    unknown = [m for m in questions if m[1][1] == DONT_KNOW][:n]
    prompts = [render(m[:1], tokenizer)[0] for m in unknown]
    invented = answer_all(params, cfg, tokenizer, prompts, cfg.block_size // 2, temperature=1.2)
    pairs = [(m, DONT_KNOW) for m in known] + list(zip(unknown, invented))
    examples = []
    for messages, rejected in pairs:
        if rejected.strip() and rejected != messages[1][1]:
            both = messages, [messages[0], ("assistant", rejected, True)]
            examples.append([tuple(map(np.array, render(m, tokenizer))) for m in both])
    return examples


# ---------------------------------------------------------------- main


@dataclasses.dataclass(frozen=True)
class Config(gpt.Config):
    pairs: str = setting((), "questions and answers, JSON or JSON lines; nothing: the built-in ones",
                         nargs="*", positional="pairs", metavar="PAIRS")
    init: str = setting("", "checkpoint to start from; nothing: base.npz in out_dir, for DPO"
                        " chat.npz", metavar="CKPT")
    eval: str = setting("", "questions to test with; without PAIRS nothing is trained",
                        metavar="PAIRS")
    show: int = setting(0, "print this many examples with what is trained, and stop")
    replay: float = setting(0.25, "part of the rows that is pretraining text", high=0.9)
    dpo: str = setting(None, "preferences to train on; without a file: the corrections made in the"
                       " chat, and built-in ones", nargs="?", const="", metavar="PREFERENCES")
    beta: float = setting(0.1, "DPO: how far the model may move from what it was")
    batch_size: int = setting(32, "rows in a micro-batch", low=1)
    max_steps: int = setting(600, "optimiser steps [with --dpo: 60]", low=1)
    learning_rate: float = setting(2e-3, "at its peak; then along a cosine to 5 % [--dpo: 3e-5]")


def make_if_missing(path, script, flags=()):
    """Run the main of the script that makes a default input, unless it is there and finished."""
    name = pathlib.Path(script.__code__.co_filename).name
    if not path.exists():
        print(f"no {path} yet: running {name}")
        return script(list(flags))
    _, about, cfg, _ = gpt.load_checkpoint(path)
    if about["step"] < cfg.max_steps:
        print(f"{path} is unfinished: going on with {name}")
        script([*flags, "--resume"])


def read_test(path):
    """Questions with their answers -> [(messages, record)]"""
    odd = {}
    test = [(messages, record) for [messages], record, _ in conversations(path, odd)]
    report(odd)
    if not test:
        raise InputError(f"{path}: no question with an answer in it")
    return test


def main(argv):
    cfg, given = read_flags(Config, argv, __doc__)
    gpt.join(cfg)
    gpt.check_device()
    out_dir, data_dir, dpo = pathlib.Path(cfg.out_dir), cfg.data_dir, cfg.dpo is not None
    path = out_dir / ("dpo.npz" if dpo else "chat.npz")
    only_test = cfg.eval and not (dpo or cfg.pairs or cfg.resume)
    if dpo and cfg.pairs:
        raise InputError(f"{cfg.pairs[0]}: preferences go behind --dpo; PAIRS are for fine-tuning")
    for name in {*cfg.pairs, cfg.eval} - {"", "-"}:
        read_test(name)  # what is wrong with it is told now, not after a pretraining
    if not (cfg.init or cfg.resume):
        start, script = (out_dir / "base.npz", gpt.main)
        if dpo or only_test:
            start, script = out_dir / "chat.npz", main
        flags = [f"--{n}={getattr(cfg, n)}" for n in ("data_dir", "out_dir", "seed") if n in given]
        make_if_missing(start, script, flags)
        cfg = dataclasses.replace(cfg, init=str(start))
    if dpo and not cfg.resume:
        unset = {"max_steps": 60, "learning_rate": 3e-5, "eval_every": 20}
        cfg = dataclasses.replace(cfg, **{k: v for k, v in unset.items() if k not in given})
    start = path if cfg.resume else cfg.init
    state, about, _, tokenizer = gpt.load_checkpoint(start, gpt.PARTS if cfg.resume else gpt.PARTS[:1])
    cfg = gpt.inherit(cfg, given - {"dpo"} if cfg.dpo == "" else given, about, start)
    test = []
    if cfg.eval or not (cfg.pairs or cfg.dpo):
        test = read_test(cfg.eval or f"{data_dir}/qa_test.jsonl")
    if only_test:
        grade(state["params"], cfg, tokenizer, test, "now")
        return table(test, ["now"])
    if cfg.dpo == "":
        examples = built_in_preferences(cfg, tokenizer)
    elif dpo:
        examples = read_examples([cfg.dpo], tokenizer, cfg.block_size, PREFERENCE)
    else:
        pairs = cfg.pairs or [f"{data_dir}/qa.jsonl"]
        examples = read_examples(pairs, tokenizer, cfg.block_size)
    if cfg.show:
        return print("\n".join(show(*a, tokenizer) for e in examples[:cfg.show] for a in e))
    held = len(examples) // (10 if dpo else 20) if cfg.pairs or dpo else 0
    objective, batch_at, validate, measure = (prefer if dpo else imitate)(cfg, examples, held, tokenizer)
    tokens = sum(trained.sum() for example in examples for _, trained in example)
    print(f"{len(examples)} examples, {held} of them held out, {tokens} trained tokens")
    data = zlib.crc32(b"".join(ids.tobytes() for example in examples for ids, _ in example))
    if not cfg.resume:
        params = state["params"]
        if dpo and test:
            grade(params, cfg, tokenizer, test, "before")
        before = {name: float(value) for name, value in measure(params).items()}
        base = about.get("base", zlib.crc32(params["wte"]))
        if about["kind"] == "base":  # the roles' ids were reserved, never seen: begin amid others
            noise = np.random.default_rng(cfg.seed).normal(0, 0.02, (2, cfg.n_embd))
            params["wte"][[USER, ASSISTANT]] = params["wte"].mean(0) + noise
        state, about = gpt.new_state(params), {
            "kind": "chat", "tokenizer": about["tokenizer"], "step": 0, "seconds": 0.0, "log": [],
            "base": base, "data": data, "before": before}
    elif about["data"] != data:
        raise InputError(f"{path}: was begun with other examples than those there are now; start"
                         " afresh without --resume")
    state = gpt.train(cfg, state, about, objective, batch_at, validate, path)
    for name, value in measure(state["params"]).items():
        print(f"{name}: {about['before'][name]:.3f} -> {value:.3f}")
    if test:
        grade(state["params"], cfg, tokenizer, test, "after")
        table(test, ["before", "after"] if dpo and not cfg.resume else ["after"])
    print(f"checkpoint: {path}\nnext: python chat.py {path}")


if __name__ == "__main__":
    run(main)
