"""Why the code is right: its second explanation. The model once more in plain NumPy, its backward
pass by hand; then what must hold for step, generation, tokenizer, masks, files, and the programs.
What teaches most ends with the DPO loss; behind it files and programs are tried.

    python -m pytest -q              # on a Mac this runs every check on the Apple GPU
    python -m pytest -q -k twin      # the tests whose name holds this word
"""
import bz2, doctest, gzip, io, json, os, re, select, shlex, shutil, signal, socket, subprocess
import sys, time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest.mock import DEFAULT, Mock

# Of two such flags the last one counts, so gpt.py does not change this.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import chat, gpt, prepare, sft
import jax
import numpy as np
import pytest
from corpus import wording, world
from corpus.world import built_in_corpus, reworded
from jax import tree
from prepare import ASSISTANT, END, SPECIAL, USER, InputError, Tokenizer

pytestmark = pytest.mark.filterwarnings("error")  # deprecations too
# Arrays with different numbers of dimensions are not combined by accident. Only norm may do that,
# where x (B, T, C) meets its gain (C,).
jax.config.update("jax_numpy_rank_promotion", "raise")
gpt.norm = jax.numpy_rank_promotion("allow")(gpt.norm)
parametrize = pytest.mark.parametrize
param = pytest.param  # one case
approx = pytest.approx
only_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals and terminals")

# ---------------------------------------------------------------- the NumPy twin
B, T, L, H, D, V = 6, 7, 2, 3, 22, 13  # sizes that cannot be mistaken for one another

# Each layer of one sequence x (T, C) returns its output y and the way back: a function of dy, the
# gradient with respect to y, that gives dx and the gradient of the parameters.
def twin_norm(x, gain=1.0):
    """y = x r gain with r = mean(x^2)^(-1/2). A change dx changes r by -r^3 mean(x dx), so with
    dh = dy gain the gradient is r dh - x r^3 mean(x dh). back also returns the gradient of the
    gain, for x (T, C); attention does not use it, for there the gain is constant."""
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    def back(dy):
        dh = dy * gain
        return r * dh - x * r**3 * (x * dh).mean(-1, keepdims=True), (dy * x * r).sum(0)
    return x * r * gain, back

def twin_rotate(x, angle):
    """A pair of numbers is a complex number, which e^(i angle) turns. The way back turns by -angle.
    """
    a, b = np.split(x, 2, axis=-1)
    turned = (a + 1j * b) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)

def twin_softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)

def twin_attention(x, wqkv, wo):
    q, k, v = (x @ wqkv).reshape(-1, 3, H, D).transpose(1, 2, 0, 3)  # (H, T, D) each
    angle = np.arange(len(x))[:, None] / 10000 ** (np.arange(D // 2) / (D // 2))
    q, q_back = twin_norm(twin_rotate(q, angle), 1.2)
    k, k_back = twin_norm(twin_rotate(k, angle), 1.2)
    scores = q @ k.swapaxes(1, 2) / np.sqrt(D)
    a = twin_softmax(np.where(np.tri(len(x)) > 0, scores, -np.inf))
    o = (a @ v).swapaxes(0, 1).reshape(-1, H * D)

    def back(dy):  # ds is through the softmax: from da to a (da - sum of a da)
        do = (dy @ wo.T).reshape(-1, H, D).swapaxes(0, 1)
        da, dv = do @ v.swapaxes(1, 2), a.swapaxes(1, 2) @ do
        ds = a * (da - (a * da).sum(-1, keepdims=True)) / np.sqrt(D)
        dq = twin_rotate(q_back(ds @ k)[0], -angle)
        dk = twin_rotate(k_back(ds.swapaxes(1, 2) @ q)[0], -angle)
        dqkv = np.array([dq, dk, dv]).transpose(2, 0, 1, 3).reshape(len(x), -1)
        return dqkv @ wqkv.T, {"wqkv": x.T @ dqkv, "wo": o.T @ dy}
    return o @ wo, back

def twin_mlp(x, w_up, w_down):
    u = np.maximum(x @ w_up, 0)
    def back(dy):
        du = dy @ w_down.T * 2 * u
        return du @ w_up.T, {"w_up": x.T @ du, "w_down": (u**2).T @ dy}
    return u**2 @ w_down, back

def twin(params, x, y, w):
    """One sequence in float64: x, y, w (T,) -> logits, the weighted loss, its gradient by hand."""
    h, wte_back = twin_norm(params["wte"][x])  # h: the residual stream
    grads = {"blocks": [{} for _ in params["blocks"]]}
    ways_back = []  # of each layer, with the names of its parameters and where their gradients go
    for block, block_grads in zip(params["blocks"], grads["blocks"]):
        for gain, name, layer in ("norm1", "attn", twin_attention), ("norm2", "mlp", twin_mlp):
            normed, norm_back = twin_norm(h, block[gain])
            change, back = layer(normed, **block[name])
            h = h + change
            ways_back.append((block_grads, gain, name, norm_back, back))
    last, norm_back = twin_norm(h, params["norm"])
    logits = last @ params["wte"].T
    probabilities = twin_softmax(logits)
    targets = np.eye(V)[y]
    loss = -w @ np.log((probabilities * targets).sum(-1))

    dlogits = w[:, None] * (probabilities - targets)  # softmax and cross-entropy together
    dh, grads["norm"] = norm_back(dlogits @ params["wte"])
    for block_grads, gain, name, norm_back, back in reversed(ways_back):
        dnormed, block_grads[name] = back(dh)
        dx, block_grads[gain] = norm_back(dnormed)
        dh = dh + dx
    # The embedding is used twice: as the output layer and as the table.
    grads["wte"] = dlogits.T @ last + np.eye(V)[x].T @ wte_back(dh)[0]
    return logits, loss, grads

# A model whose parameters are all random, a batch with uneven weights, what the twin says of them.
CFG = sft.Config(n_layer=L, n_head=H, n_embd=H * D, block_size=T, vocab_size=V, batch_size=B,
                 dtype="float32", weight_decay=0.1, beta=0.3)
RNG = np.random.default_rng(0)
PARAMS = tree.map(lambda p: p + np.float32(RNG.normal(0, 0.2, p.shape)), gpt.init_params(CFG, RNG))
EXACT, TOKENS = tree.map(np.float64, PARAMS), np.int32(RNG.integers(0, V, (B, T + 1)))
X, Y, W = BATCH = TOKENS[:, :-1], TOKENS[:, 1:], np.float32(RNG.integers(0, 3, (B, T)))
LOGITS, LOSSES, GRADIENTS = zip(*(twin(EXACT, *row) for row in zip(X, Y, W)))
GRADIENT = tree.map(lambda *g: sum(g), *GRADIENTS)

def assert_close(a, b, tolerance):
    """Trees of arrays, each compared on the scale of its largest number."""
    for (name, x), y in zip(gpt.named_leaves(a).items(), tree.leaves(b)):
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), name

# ---------------------------------------------------------------- model, step, generation
@parametrize("module", [prepare, gpt, sft, chat, wording, world])
def test_the_examples_in_docstrings_are_right(module):
    results = doctest.testmod(module)
    assert results.attempted and not results.failed

@parametrize("dtype, near, queries", [
    param("float32", 1e-4, 3, id="float32, three blocks of queries"),
    param("bfloat16", 0.05, 9, id="bfloat16, one block"),
])
def test_logits_loss_and_every_gradient_equal_the_twins(dtype, near, queries, monkeypatch):
    monkeypatch.setattr(gpt, "QUERIES", queries)
    cfg = replace(CFG, dtype=dtype)
    twins = np.array(LOGITS)
    logits = gpt.logits_of(PARAMS, gpt.forward(PARAMS, X, cfg)[0], cfg)
    assert_close(logits, twins, near)
    is_rounded = dtype == "bfloat16" and not gpt.on_metal()
    assert (np.abs(logits - twins).max() > 1e-3) == is_rounded
    objective = jax.jit(jax.value_and_grad(partial(gpt.loss, cfg=cfg), has_aux=True))
    (total, count), gradient = objective(PARAMS, BATCH, None)
    assert total == approx(sum(LOSSES), rel=near / 5) and count == W.sum()
    assert_close(gradient, GRADIENT, near)

def test_dropout_depends_on_key_and_place_keeps_the_mean_and_is_off_without_a_key():
    cfg = replace(CFG, dropout=0.25)
    ones = np.ones((99, 99))
    def dropped(key, place):
        return gpt.drop(ones, cfg, np.uint32([0, key]), place)
    here = dropped(1, 5)
    assert (here != dropped(1, 6)).any()
    assert (here != dropped(2, 5)).any()
    assert gpt.drop(ones, cfg, None, 5) is ones
    assert np.unique(here) == approx([0, 4 / 3])
    assert here.mean() == approx(1, abs=0.02)

def test_adam_equals_its_closed_form_with_decay_and_clipping():
    """Its means are those of all gradients so far, each with weight beta^age."""
    params = {"matrix": np.ones((3, 5)), "gain": np.ones(5)}
    state = gpt.new_state(params)
    past = []  # gradients so far, clipped
    for t in range(5):
        grads = tree.map(lambda p: RNG.normal(size=p.shape) * 10.0 ** (t - 2), params)
        grads["matrix"][[0, t % 3]] = 0  # row 0 never has a gradient, others not always
        state = gpt.adam(state, grads, t + 1, 0.01, CFG)
        length = np.sqrt(sum((g**2).sum() for g in grads.values()))
        past.append(tree.map(lambda g: g / max(1, length), grads))
        age = np.arange(t, -1, -1)  # of past[0], past[1], ...
        def new_value(p, *gs):
            mean = np.average(gs, 0, 0.9**age)  # divided by the sum of the weights
            square = np.average(np.square(gs), 0, 0.99**age)
            decay = 0.1 * p * (square > 0) if p.ndim > 1 else 0
            return p - 0.01 * (mean / (np.sqrt(square) + 1e-8) + decay)
        params = tree.map(new_value, params, *past)
    assert_close(state["params"], params, 1e-5)

@parametrize("micro, shard", [
    param(1, False, id="a batch on 6 devices"),
    param(3, True, id="three micro-batches, each on 2 devices, with split parameters"),
])
def test_a_step_takes_the_twins_gradient_however_batch_and_parameters_are_split(micro, shard):
    cfg = replace(CFG, batch_size=B // micro, grad_accum=micro, shard_params=shard, grad_clip=0)
    before = gpt.new_state(PARAMS)
    home = gpt.placements_of(before, cfg)
    def batch_at(n):
        number, part = divmod(n, micro)
        weights = W * (number == 4)  # step 5 has none: its gradient is zero, not NaN
        return [np.split(a, micro)[part] for a in (X, Y, weights)]
    step = gpt.make_step(partial(gpt.loss, cfg=cfg), batch_at, cfg, home)
    for number, divisor in (4, W.sum()), (5, np.inf):
        state, mean = step(tree.map(gpt.put, before, home), number, 0.01)
        assert float(mean) == approx(sum(LOSSES) / divisor, rel=1e-5)
        gradient = tree.map(lambda g: np.float32(g / divisor), GRADIENT)
        assert_close(state, gpt.adam(before, gradient, number + 1.0, 0.01, cfg), 1e-3)
    for array in tree.leaves(state):
        assert array.sharding.is_fully_replicated != shard

def test_each_micro_batch_has_a_dropout_key_of_its_own():
    def number_in_key(params, batch, key):
        return key[1] + 0 * params["norm"][0], 1
    cfg = replace(CFG, grad_accum=3)
    state = gpt.new_state(PARAMS)
    step = gpt.make_step(number_in_key, lambda n: [], cfg, gpt.placements_of(state, cfg))
    assert step(state, 4, 0.01)[1] == 13  # the mean of 12, 13 and 14

def test_each_place_of_dropout_has_a_number_of_its_own(monkeypatch):
    numbers = []
    monkeypatch.setattr(gpt, "drop", lambda x, cfg, key, number: numbers.append(number) or x)
    gpt.forward(PARAMS, X, CFG)
    assert len({*numbers}) == len(numbers) == 1 + 2 * L

# A token is as many places after END as it says. A row begins with END, or 4 or more after it.
@parametrize("length, begins", [
    param(5, {END, 4}, id="documents that fit a row of 8"),
    param(12, {END, *range(4, 12)}, id="documents longer than a row"),
])
def test_rows_begin_with_a_near_end_and_all_tokens_are_targets_about_equally_often(length, begins):
    ids = np.arange(1, 401) % length  # documents, such as 1 2 3 4 and then 0, which is END
    x, y, w = gpt.random_batch(ids, 2400, 8, seed=0, number=0)
    assert (y == (x + 1) % length).all() and w.all()
    assert {*x[:, 0]} == begins
    often = np.bincount(y.ravel())
    assert often.max() < 2 * often.mean() < 4 * often.min()

def test_a_document_is_read_from_an_end_before_it_to_its_last_token_as_seed_and_number_say():
    places = np.arange(1, 401)  # one document
    x, y, _ = gpt.random_batch(places, 999, 8, seed=0, number=0)
    assert (y == x + 1).all()  # END is 0
    assert x.min() == END and y.max() > 390
    for other in {"seed": 1, "number": 0}, {"seed": 0, "number": 1}:
        assert (x != gpt.random_batch(places, 999, 8, **other)[0]).any()

def test_validation_is_the_mean_of_the_twins_losses_and_their_bits_for_a_byte():
    ids = TOKENS.ravel()[:5 * T + 1]  # 5 rows; a batch has more
    x, y = np.reshape([ids[:-1], ids[1:]], (2, 5, T))
    nats = sum(twin(EXACT, *row, np.ones(T))[1] for row in zip(x, y))
    n_bytes = (y >= len(SPECIAL)).sum()  # each other id here is a byte
    found = gpt.make_validation(ids, TOKENIZER, CFG)(PARAMS)
    assert found == approx((nats / y.size, nats / np.log(2) / n_bytes), rel=1e-4)

def test_generation_with_the_cache_is_the_argmax_of_the_full_pass_past_block_size_too(monkeypatch):
    monkeypatch.setattr(gpt, "END", 11)  # an id that some rows come to
    prompts = [row[:n].tolist() for row, n in zip(X, [1, 3, T, 2, 5])]
    prompts.append([11] * (T + 2))  # longer than the context
    prompts += [[1], [2]]  # then there are 8, one for each device
    steps = [ids for ids, _ in gpt.make_generator(CFG)(PARAMS, prompts, 3 * T, RNG)]
    said = [*zip(*steps)]  # what each row says
    assert {11 in row for row in said} == {True, False}
    for prompt, new in zip(prompts, said):
        window = prompt[-T:]
        for i, id in enumerate(new):
            if len(window) > T:  # it begins again with its later half
                window = window[-(T // 2 + 1):]
            likeliest = twin(EXACT, window, window, np.zeros(len(window)))[0][-1].argmax()
            assert id == (11 if 11 in new[:i] else likeliest)
            window = [*window, id]

def test_sampling_obeys_temperature_top_k_top_p_and_penalty():
    def drawn(temperature=1, history=(), **how):
        logits = np.log([0.5, 0.3, 0.15, 0.05])
        rng = np.random.default_rng(0)
        return Counter(gpt.sample(logits, history, rng, temperature, **how) for _ in range(2000))
    assert {*drawn(top_p=0)} == {0}
    assert {*drawn(0, [0], repetition_penalty=2.0)} == {1}  # also where logits are negative
    assert {*drawn(top_k=2)} == {*drawn(top_p=0.79)} == {0, 1}
    assert {*drawn(top_p=0.81)} == {0, 1, 2}
    assert drawn()[1] == approx(600, abs=60)
    assert drawn(temperature=2)[1] == approx(587, abs=60)

# ---------------------------------------------------------------- helpers: files and programs
def user(text):
    return {"role": "user", "content": text}

def assistant(text):
    return {"role": "assistant", "content": text}

def write(name, text):
    """A file, packed as its ending says; surrogates stand for bytes that are not UTF-8."""
    path = Path(name)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(text.encode("utf-8", "surrogateescape")))

read_log = partial(np.genfromtxt, delimiter=",", skip_header=1)
DOCUMENTS = [
    "the cat sat on the mat and the rat ran from the cat to the hat\n" * 40, "one cat", "café"]
TINY = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --log_every=1"
BASE = (f"gpt {TINY} --n_embd=32 --block_size=96 --dropout=0.02 --grad_accum=2 --max_steps=100"
        " --eval_every=7")
CHAT = ("sft pairs.json --batch_size=8 --max_steps=100 --eval_every=7 --log_every=1"
        " --learning_rate=0.01")
DPO = "sft --dpo=prefs.json --batch_size=4 --max_steps=40 --eval_every=7 --log_every=1"
# Questions and answers; as there is something rejected in them, they also serve as preferences.
PAIRS = f"""{{"prompt": "where is the cat?", "chosen": "the cat sat on the mat", "rejected": "Z"}}
{{"prompt": "who ran?", "chosen": "the rat ran", "rejected": "Z"}}
{{"prompt": "{'X' * 90}", "chosen": "Y", "rejected": "Z"}}
{{"prompt": "{'X' * 91}", "chosen": "Y", "rejected": "Z"}}
"""  # X is a token; so are three special ones, two spaces and Y: 96 in the third and 97 in the last

def outcome(command):
    """What a command prints; for an error its one line, after checking the exit status."""
    script, *argv = shlex.split(command)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        try:
            prepare.run(sys.modules[script].main, argv)
        except SystemExit as e:
            assert e.code == 2 and re.fullmatch("error: .*\n", errors.getvalue())
    return errors.getvalue() or out.getvalue()

def start(command, shell=None, **env):
    """The same as a process of its own. shell: a line for sh that starts it, in which "$@" stands
    for the command and all its arguments."""
    script, *argv = shlex.split(command)
    argv = [sys.executable, sys.modules[script].__file__, *argv]
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    return subprocess.Popen(["sh", "-c", shell, "sh", *argv] if shell else argv, encoding="utf-8",
                            errors="surrogateescape", env=os.environ | env, **pipes)

def end(process, typed=None):  # -> what it printed, its errors, its exit status
    return *process.communicate(typed), process.returncode

def documents():
    tokenizer = Tokenizer.load("data/tokenizer.json")
    tokenizer.bytes[END] = b"\0"
    ids = [*np.fromfile("data/train.bin", "<u2"), *np.fromfile("data/val.bin", "<u2")]
    return tokenizer.decode(ids).split("\0")[:-1]

def words_of(checkpoint):
    return gpt.load_checkpoint(checkpoint)[1]["words"]

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """In a new folder: a text, and a base, a chat and a DPO model from it. What was printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("made"))
        write("pairs.json", PAIRS.replace("chosen", "response"))
        write("prefs.json", PAIRS * 9)
        write("text.jsonl", "\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
        yield "".join(map(outcome, ["prepare text.jsonl --vocab_size=300", BASE, CHAT, DPO]))

# ---------------------------------------------------------------- tokenizer and examples
def naive_bpe(words, vocab_size):
    """The definition: before each merge count all pairs; the most frequent, of equals the smallest.
    An id is a character, so that str.replace merges: bytes begin at 3, merges at 259."""
    words = ["".join(chr(3 + b) for b in word.encode()) for word in words]
    merges = []
    for new in range(259, vocab_size):
        count = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if count[best] < 2:
            break
        words = [word.replace("".join(best), chr(new)) for word in words]
        merges.append(tuple(map(ord, best)))
    return merges

def tokenizer_of(text, size=320):
    return Tokenizer(prepare.train_bpe(Counter(prepare.WORD.findall(text)), size))

TOKENIZER = tokenizer_of("the cat sat on the mat, the hat; user assistant end 1234 naïve café " * 3)

def odd_texts():
    """Fragments that nest and split the special tokens, among any code points."""
    rng = np.random.default_rng(1)
    fragments = "<| |> user é \U0001f600 12345 'll \ud800 \0".split(" ")
    for top in [0x250, 0x110000] * 200:
        others = [*SPECIAL, " the", "  ", "\n", *map(chr, rng.integers(top, size=14))]
        yield "".join(rng.choice(np.array(fragments + others, object), rng.integers(20)))

def test_fast_training_learns_the_merges_of_the_naive_definition():
    for seed in range(50):
        words = "".join(np.random.default_rng(seed).choice(list("aaabbc  é"), 200)).split(" ")
        assert prepare.train_bpe(Counter(words), 290) == naive_bpe(words, 290)

def test_any_text_survives_encoding_and_no_text_becomes_a_special_token(tmp_path):
    write(tmp_path / "tokenizer.json", TOKENIZER.to_json())
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    for text in odd_texts():
        ids = TOKENIZER.encode(text)
        assert again.decode(ids) == text.encode("utf-8", "replace").decode()
        assert again.encode(text) == ids
        assert not {END, USER, ASSISTANT} & {*ids}
        ids = [*ids, END, *range(200, 250)][::-1]  # also pieces of characters can be streamed
        pieces = b"".join(TOKENIZER.bytes[id] for id in ids)
        assert TOKENIZER.decode(ids) == pieces.decode("utf-8", "replace")

@parametrize("text", ["a", " ", "\n ", "한", "東", "e\u0301", "\u0e01\u0e34", "_", "7"])
def test_hostile_text_takes_linear_time(text):
    text *= 1 << 17
    for tokenizer in (tokenizer_of(text, 270), TOKENIZER):  # quadratic time would be hours
        assert tokenizer.decode(tokenizer.encode(text)) == text

@parametrize("text", [
    "हिन्दी| में| लिखा",
    "Cafe\u0301| cre\u0300me",
    "ภาษา|ไทยที่|นี่",
    "It|'s| |123|45| naïve|!",
    "T|シャツ",
])
def test_marks_stay_in_their_word_scripts_are_not_mixed_and_digits_come_in_threes(text):
    assert prepare.WORD.findall(text.replace("|", "")) == text.split("|")

def test_a_word_that_training_never_had_is_read_as_the_frequent_one_a_slip_away():
    words = {"language": 99, "languages": 1, "peru": 50, "nation": 70, "nations": 20, "capital": 19}
    def as_read(typed):
        return sft.as_read(typed, words)
    assert as_read("Lanugage, langage") == "Language, language"  # two swapped, one left out
    assert as_read("languuage, lamguage") == "language, language"  # one doubled, a wrong one
    assert as_read("peeru, preu") == "peru, preu"  # in a short word a swap could be another word
    assert as_read("natoin") == "nation"  # of two that are near the more frequent
    for typed in ("languages", "lagnuagge", "capitel"):  # known, two slips, near a rare word
        assert as_read(typed) == typed
    assert sft.as_read("The lanugage", {}) == "The lanugage"
    about = {}
    sft.learn_words(about, TOKENIZER, text_ids=[], examples=[])  # without the text
    assert about == {}

def test_the_prompt_of_chat_begins_the_training_example():
    answered = sft.Message("assistant", "a mat", trained=True)
    for text in odd_texts():
        asked = sft.Message("user", text)
        prompt = chat.prompt_ids([asked], TOKENIZER, 256)
        ids, trained = sft.render([asked, answered], TOKENIZER)
        assert prompt == ids[:len(prompt)] and trained.index(True) == len(prompt)

def test_the_dpo_loss_and_its_gradient_equal_the_papers():
    """The twin's batch as three pairs of rows, chosen and rejected."""
    logp = np.negative(LOSSES)
    reference = np.float32(logp - RNG.normal(size=6))
    n_trained = W.sum(1)
    def papers_loss(logp):  # of each pair
        chosen, rejected = CFG.beta * (logp - reference).reshape(3, 2).T
        imitation = -(logp / n_trained)[::2]
        return np.log1p(np.exp(rejected - chosen)) + imitation
    slopes = [(papers_loss(logp + change) - papers_loss(logp - change)).sum() / 2e-6
              for change in 1e-6 * np.eye(6)]  # by the log-probability of each row

    objective = jax.jit(jax.value_and_grad(partial(sft.dpo_loss, cfg=CFG), has_aux=True))
    (total, count), gradient = objective(PARAMS, [*BATCH, reference], None)
    assert count == 3
    assert total == approx(papers_loss(logp).sum(), rel=1e-4)
    papers = tree.map(lambda *g: -np.tensordot(slopes, g, 1), *GRADIENTS)  # the chain rule
    assert_close(gradient, papers, 1e-3)

    # With four references the last two rows are replayed text: each pair adds their mean loss.
    total, _ = sft.dpo_loss(PARAMS, [*BATCH, reference[:4]], None, CFG)
    replayed = -(logp / n_trained)[4:].mean()
    assert total == approx((papers_loss(logp)[:2] + replayed).sum(), rel=1e-4)
    # The rejected of examples that only keep an answer has no trained token.
    kept = [X, Y, W * np.float32([[1], [0]] * 3), reference]
    assert all(np.isfinite(g).all() for g in tree.leaves(objective(PARAMS, kept, None)))

# ---------------------------------------------------------------- files as people have them
def shown(name, text, record):
    """Write a file that holds this record -> what sft.py --show prints of it, with what is trained
    in brackets: an example a line, the two dialogues of a preference on one."""
    write(name, text)
    flag = "--dpo=" if "chosen" in record else ""
    examples = outcome(f"sft {flag}{name} --show=9 --init=out/base.npz")
    return examples.replace("\n<|user", " <|user")

@parametrize("record, expected", [
    param('{"instruction": "Sum", "context": "2+2", "response": "4"}',
          "<|user|> Sum\n\n2+2<|assistant|>[ 4<|end|>]", id="Dolly with a context"),
    param('{"prompt": "Schlüssel?", "completion": "weiß 😀 — 東京 \\ud83d"}',
          "<|user|> Schlüssel?<|assistant|>[ weiß 😀 — 東京 ?<|end|>]", id="half of a surrogate pair"),
    param('{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}, '
          '{"role": "assistant", "content": "Ho", "tool_calls": null}]}',
          "<|user|> Hi<|assistant|>[ Ho<|end|>]", id="OpenAI's messages, an empty system turn"),
    param('{"messages": [{"role": "developer", "content": "Be"}, {"role": "user", "content": "1"}, '
          '{"role": "assistant", "content": "2", "weight": 0}, {"role": "user", "content": "3"}, '
          '{"role": "assistant", "content": "4", "weight": 1}]}',
          "<|user|> Be\n\n1<|assistant|> 2<|end|><|user|> 3<|assistant|>[ 4<|end|>]",
          id="OpenAI's messages with a developer's turn and weights"),
    param('{"conversations": [{"role": "user", "content": [{"text": "H"}, {"text": "i"}]}, '
          '{"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Bye"}]}',
          "<|user|> Hi<|assistant|>[ Ho<|end|>]",
          id="text in parts, and a last question without an answer"),
    param('{"instruction": "A", "input": "B", "chosen": "C", "rejected": "D"}',
          "<|user|> A\n\nB<|assistant|>[ C<|end|>] <|user|> A\n\nB<|assistant|>[ D<|end|>]",
          id="a preference in Alpaca's fields"),
    param('{"prompt": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, '
          '{"role": "user", "content": "C"}], '
          '"chosen": [{"role": "assistant", "content": "B"}], "rejected": "D"}',
          "<|user|> A<|assistant|> B<|end|><|user|> C<|assistant|>[ B<|end|>] "
          "<|user|> A<|assistant|> B<|end|><|user|> C<|assistant|>[ D<|end|>]",
          id="a preference after several turns"),
    param('{"prompt": "A ", '
          '"chosen": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}], '
          '"rejected": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "C"}]}',
          "<|user|> A<|assistant|>[ B<|end|>] <|user|> A<|assistant|>[ C<|end|>]",
          id="a preference whose turns repeat the prompt, but for a space"),
    param('{"system": "Be", "prompt": "Hi", "messages": [{"role": "system", "content": "Be"}, '
          '{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}',
          "<|user|> Be\n\nHi<|assistant|>[ Ho<|end|>]", id="messages that repeat other fields"),
    param('{"system": "Be", "messages": [{"role": "system", "content": "Or not"}, '
          '{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}',
          "<|user|> Be\n\nOr not\n\nHi<|assistant|>[ Ho<|end|>]", id="two systems"),
    param('{"conversations": [{"from": "human", "value": "A"}], '
          '"chosen": {"from": "gpt", "value": "B"}, "rejected": {"from": "gpt", "value": "C"}}',
          "<|user|> A<|assistant|>[ B<|end|>] <|user|> A<|assistant|>[ C<|end|>]",
          id="LLaMA-Factory's preference, each answer a turn"),
    param('{"system": "Be", '
          '"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}',
          "<|user|> Be\n\nHi<|assistant|>[ Ho<|end|>]", id="ShareGPT with a system field"),
    param('{"system_prompt": "Be", "instruction": "C", "output": "D", "history": [["A", "B"]]}',
          "<|user|> Be\n\nA<|assistant|>[ B<|end|>]<|user|> C<|assistant|>[ D<|end|>]",
          id="LLaMA-Factory's history of pairs"),
    param('{"instruction": "C", "output": "D", '
          '"history": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}',
          "<|user|> A<|assistant|>[ B<|end|>]<|user|> C<|assistant|>[ D<|end|>]",
          id="a history of turns"),
    param('{"system": "Be", "question": "Hi", "answer": "Ho", '
          '"output": null, "messages": NaN, "history": NaN}',
          "<|user|> Be\n\nHi<|assistant|>[ Ho<|end|>]",
          id="question and answer, other fields null or NaN"),
    param('[{"id": 1, "content": "Hi", "role": "user"}, {"role": "assistant", "content": "Ho"}]',
          "<|user|> Hi<|assistant|>[ Ho<|end|>]", id="a list of turns and nothing around it"),
    param(r'{"prompt": "A\r\nB", "completion": "C\fD\rE"}',
          "<|user|> A\nB<|assistant|>[ C\n\nD\nE<|end|>]", id="form feed and odd line ends"),
    param('{"prompt": "IN CAPITALS?", "completion": "IN CAPITALS!"}',
          "<|user|> in capitals?<|assistant|>[ IN CAPITALS!<|end|>]",
          id="a question all in capitals becomes small, an answer does not"),
])
def test_a_record_of_any_public_shape_is_read(made, record, expected):
    assert expected in shown("lines", f"\ufeff{record}\r\n", record)
    over_lines = re.sub("([{,]) *([\"{])", "\\1\n  \\2", record)  # as jq prints it
    for twice in (f"[\n{record},\n{record}\n]", f"[{record}, {record}]", f"{over_lines}\n" * 2,
                  f"[{over_lines}, {over_lines}]", f'{{"n": 2, "data": [{record}, {record}]}}'):
        assert shown("twice", twice, record).endswith(f"{expected} {expected}\n"), twice

@parametrize("before, between, after", [
    param("", "\n", "", id="a record a line"),
    param("[", ",\n", "]", id="a list"),
    param("[", ", ", "]", id="a list on one line"),
])
@parametrize("broken", [
    param('{"prompt": "c"', id="no brace at the end"),
    param(f'{{"prompt": {"9" * 5000}}}', id="a number too long for Python"),
    param('{"a":' * 100000, id="objects nested too deep"),
    param('{"prompt": "c", "response": "d",}', id="a comma too many"),
    param('{"prompt": "c"d", "e": "f"}', id="a quotation mark within a text"),
    param('{"prompt": "c\n", "response": "d"}', id="a line end within a text"),
    param('{"prompt": [{}, {"c": d}]}', id="a word without quotation marks, in a list"),
    param('{"messages": [{"role": "a "b" c"}, {"role": "d"}], "id": 5}', id="a quote, and more"),
])
def test_broken_json_costs_itself_and_at_most_the_next_record_and_its_line_is_named(
        before, between, after, broken, tmp_path):
    good = [{"prompt": f"{n}", "response": [{}]} for n in range(4)]  # with braces within
    texts = [*map(json.dumps, good)]
    texts.insert(2, broken)
    path = tmp_path / "records"
    write(path, before + between.join(texts) + after)
    prepare.left_out.clear()
    found = [record for record, _ in prepare.read_json(prepare.read_lines(path))]
    for n in (0, 1, 3):  # a broken one that never ends may take the one after it along
        assert good[n] in found
    _, first = prepare.left_out["part(s) that are not JSON"]
    line = 3 if between.endswith("\n") else 1
    assert first.startswith(f"{path}:{line}")

def test_a_download_that_was_cut_short_costs_its_last_record():
    records = [{"text": f"{n}, [{n}]"} for n in range(99)]
    whole = json.dumps(records, indent=1)
    for end in range(300, 400):
        found = [record for record, _ in prepare.read_json([(whole[:end], "f:1")])]
        n_whole = whole[:end].count("}")
        assert found[:n_whole] == records[:n_whole]
        assert len(found) <= n_whole + 1  # what is left of the last may be a record by itself

@parametrize("record", [
    param('{"messages": [{"role": "user", "content": "Q"}, '
          '{"role": "assistant", "content": " "}]}', id="an empty answer"),
    param('[1, {"foo": null}]', id="a list of other things than turns"),
    param('{"system": "no question", "output": "A"}', id="an answer without a question"),
    param('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, '
          '{"role": "assistant", "content": "A"}]}', id="a picture"),
    param('{"messages": [{"role": "user", "content": "Q"}, '
          '{"role": "assistant", "content": "A", "weight": 0}]}', id="all answers weigh nothing"),
    param('{"messages": [{"role": "user", "content": "Q"}, '
          '{"role": "assistant", "content": "One moment", "tool_calls": [{"id": 1}]}]}',
          id="a tool is called"),
    param('{"prompt": "same", "chosen": "Yes", "rejected": "Yes"}', id="a choice of the same"),
    param('{"prompt": "none rejected", "chosen": "Yes"}', id="nothing rejected"),
])
def test_an_odd_record_costs_itself_and_is_named(made, record):
    good = '{"prompt": "Hi", "response": "Ho", "chosen": "Ho", "rejected": "No"}'
    said = shown("records.jsonl", f"{good}\n{record}\n{good}", record)
    assert re.search(r"left out: .*\b1 record.s. .*records.jsonl:2\)", said)
    assert said.count("<|assistant|>[ Ho") == 2

LATIN = "d\udce9j\udce0 vu, \udce7a \udce9t\udce9\n" * 20  # "déjà vu, ça été" as Latin-1 has it

@parametrize("name, text, expected, says", [
    param("c4-train.00000-of-01024.json.gz", '{"text": "one"}\n{"text": "two", "url": ""}\n',
          ["one", "two"], "left out: 1 field(s) not used: url",
          id="C4: JSON lines, packed by gzip, with a field not used"),
    param("wiki_00", '\n{"text": "one"}\n{"text": "two"}',
          ["one", "two"], "next", id="WikiExtractor's file: no ending, an empty line first"),
    param("w.txt.bz2", '{"text": "one and two"}\n{"text": " "}\n{"id": 1}\n{"te',
          ["one and two"], "left out: 1 empty document", id="JSON lines in a .txt, cut short"),
    param("stories.txt", "one\n<|endoftext|>\ntwo<|endoftext|>three",
          ["one\n", "two", "three"], "next", id="TinyStories: marks between documents"),
    param("dos.txt", "\ufeffone\r\ntwo\rthree\x0cfour\n", ["one\ntwo\nthree\n\nfour\n"], "next",
          id="line ends of Windows and of the old Mac, a form feed and a BOM"),
    param("spaces", "a\xa0b\u3000c\u06cc\u200c\u062e\u200d\xado",
          ["a\xa0b\u3000c\u06cc\u200c\u062e\u200d\xado"], "next", id="odd spaces stay"),
    param("list.json", r'["one", "two\r\n"]' "\n",
          ["one", "two\n"], "next", id="a list of texts"),
    param("table.csv", 'a,"b"\n',
          ['a,"b"\n'], "table.csv: not JSON, so it is read as it stands", id="a CSV"),
    param("odd.jsonl", "{'text': 'repr'}\n",
          ["{'text': 'repr'}\n"], "odd.jsonl: not JSON, so it is read as it stands",
          id="Python's repr for JSON"),
    param("two.json",
          '{"data": [{"text": "one"}, {"text": "two"}], "test": [{"text": "kept out"}]}',
          ["one", "two"], "beside the list", id="a second list beside data"),
    param("broken.txt", "caf\xe9 na\xefve\n\udce9t\xe9",
          ["caf\xe9 na\xefve\n\ufffdt\xe9"], "not UTF-8 (the first: broken.txt:2)",
          id="one byte that is not UTF-8"),
    param("markdown", "[link](x)\n{braces}\n",
          ["[link](x)\n{braces}\n"], "next", id="text that begins like JSON"),
])
def test_a_file_of_text_becomes_the_documents_that_are_in_it(
        name, text, expected, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "PIECE", 5)  # most documents come in several
    write(name, text)
    assert says in outcome(f"prepare {name} --vocab_size=300")
    assert documents() == expected

def test_of_a_folder_the_text_is_taken_and_one_odd_file_costs_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = {"nul.txt": "a\0b", "latin.txt": LATIN}
    names = """B.TXT a.md sub/c.txt.gz .hidden.txt .git/x.txt env/pyvenv.cfg env/lib/x.txt code.py
               tokenizer.json qa.jsonl nul.txt latin.txt sub/wiki_00"""
    for name in names.split():
        write(f"in/{name}", odd.get(name, name))
    write("in/a.md.gz", "packed beside it")
    with suppress(OSError):  # Windows asks for a right
        os.symlink(tmp_path / "in", "in/sub/again")
        os.symlink(tmp_path / "in/B.TXT", "in/link.txt")
        os.symlink(tmp_path / "nowhere", "in/no_dead.txt")
    said = outcome("prepare in in/B.TXT")
    assert re.search(r"left out: \d file.s. that are there twice .*; "
                     r"\d file.*no text by their name.*code.py", said)
    assert re.search("left out: 2 files .the first: in.latin.txt: not UTF-8", outcome("prepare in"))
    assert documents() == ["B.TXT", "a.md", "sub/c.txt.gz"]

def test_a_text_with_many_html_comments_is_text_and_takes_no_time():
    prepare.check_is_text(b"<!-- a comment -->\n" * 40 + b"# Title", "page.md")  # or 2^40 tries

def test_printable_takes_from_text_only_what_can_steer_a_terminal():
    harmless = "a\n\t\u00a0\u3000\u200c\u200d\u00ad é東 👨\u200d👩\U0001fae8"
    assert prepare.printable(harmless) == harmless
    for c in "\0\x07\r\x1b\x7f\x9b\ud800\u202e\u2066":
        assert prepare.printable(f"a{c}b") == "a\ufffdb"

@parametrize("quota, cores", [("150000 100000", 2), ("max 100000", 8), ("1000 100000", 1)])
def test_the_quota_of_a_container_limits_the_cores(quota, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "read_text", lambda path: quota)
    assert prepare.available_cores() == cores

# ---------------------------------------------------------------- the programs
def test_the_road_from_text_to_answers(made):
    assert re.search("python sft.py.*: 1 of 4 examples, longer.*"  # of pairs.json; prefs.json
                     ": 9 of 36 examples, longer.*27 examples, 1 of", made, re.S)
    assert documents() == DOCUMENTS
    [first] = re.findall(r"expected first loss ln \d+ = (.*)", made)
    assert abs(read_log("out/log.csv")[0, 1] - float(first)) < 0.2
    losses, held_out = read_log("out/log_dpo.csv")[:, 1:3].T
    assert losses[-9:].mean() < losses[:9].mean()
    assert held_out[6] > 0  # after step 7
    # Fine-tuning leaves the embeddings of tokens of the text alone, and trains all others.
    same = np.load("out/base.npz")["params.wte"] == np.load("out/chat.npz")["params.wte"]
    assert {*np.flatnonzero(same.all(1))} == {*np.fromfile("data/train.bin", "<u2")}
    # It knows the words of the text and of the questions, so a slip is read as what was meant.
    words = words_of("out/chat.npz")
    assert words["ran"] > 20 and words["where"] > 0 and "rann" not in words
    assert outcome("chat --prompt='who rann?'") == "the rat ran\n"
    assert outcome("sft pairs.json --show=1") == (
        "left out: 4 field(s) not used: rejected (the first: pairs.json:1)\n"
        "left out: 1 of 4 examples, longer than the context of 96 tokens"
        " (the first: pairs.json:4)\n"
        "<|user|> where is the cat?<|assistant|>[ the cat sat on the mat<|end|>]\n")

def test_a_base_model_is_asked_to_begin_a_document(made, monkeypatch):
    sample = Mock(return_value=END)
    monkeypatch.setattr(gpt, "sample", sample)
    outcome("chat out/base.npz --prompt='the cat'")
    asked = sample.call_args.args[1]
    assert asked[0] == END and END not in asked[1:]

def test_fine_tuning_joins_examples_by_chance_but_never_the_held_out_and_replays(made, monkeypatch):
    """Of a batch of four, three rows are examples and one is text. An example is told by the length
    of what is trained in it: " X" and END are 3 tokens, " XX" and END are 4."""
    answers = ["X" * n for n in range(1, 21)]
    write("lengths.json", "\n".join(f'{{"prompt": "?", "response": "{a}"}}' for a in answers))
    train = Mock(return_value={"params": None})  # nothing is trained
    monkeypatch.setattr(gpt, "train", train)
    outcome("sft lengths.json --init=out/base.npz --batch_size=4")
    _, _, _, _, batch_at, *_ = train.call_args.args
    rows = []
    replayed = set()
    for x, y, w in map(batch_at, range(300)):
        assert (x[:, 1:] == y[:, :-1])[w[:, 1:] > 0].all()
        rows += [row.tobytes() for row in w[:3].astype(np.uint8)]
        replayed.add(x[3].tobytes())
    assert len(replayed) > 9  # the text is short
    n_rows = rows.index(rows[0], 1)  # then they begin anew, in the same order
    assert rows[n_rows:2 * n_rows] == rows[:n_rows]
    answers = re.compile(b"\1+")  # where w is 1
    often = Counter(len(answer) for row in rows[:n_rows] for answer in answers.findall(row))
    assert len(often) == 19  # one of 20 is held out
    assert 3 in often  # without shuffling it would be the first answer, with its 3 tokens
    assert len({*often.values()}) == 1  # all were used equally often
    assert often.total() > 4 * n_rows and len({*rows[:n_rows]}) > 200

def test_an_answer_is_right_or_declined_or_wrong(made, monkeypatch):
    monkeypatch.setattr(world, "DONT_KNOW", "the rat ran")  # its answer to one of the questions
    monkeypatch.setattr(sft, "as_read", lambda question, words: question.replace("Z?", "who ran?"))
    write("exam.json", 20 * """{"prompt": "Z?", "response": "the rat ran"}
        {"prompt": "who ran?", "response": "no rat"}
        {"prompt": "where is the cat?", "response": "the cat sat on the mat"}
        {"prompt": "where is the cat?", "response": "on a mat"}\n""")
    os.utime("out/chat.npz", (0, 0))
    said = outcome("sft --eval=exam.json")
    os.utime("out/chat.npz")
    assert said.startswith("out/base.npz is newer")  # as after another pretraining
    assert re.search("all +80 +25.0 +50.0 +25.0\n", said)

def test_the_last_correction_of_a_question_is_learned(made):
    write("corrected/feedback.jsonl", """{"prompt": "who ran?", "chosen": "a cat", "rejected": "no"}
        {"prompt": "who ran?", "chosen": "a hat", "rejected": "no"}""")
    said = outcome("sft --dpo --init=out/chat.npz --out_dir=corrected --batch_size=4 "
                   "--max_steps=40 --learning_rate=0.006 --eval=pairs.json")
    assert re.search("corrected by you +1 +0.0 -> 100.0", said) and "now 'a hat'" in said
    assert "is finished, with 40 steps" in outcome("sft --dpo --resume --out_dir=corrected")
    # The text is counted once.
    assert words_of("out/chat.npz")["ran"] == words_of("corrected/dpo.npz")["ran"]
    other = outcome("chat corrected/dpo.npz --prompt='where is the cat?'")
    assert other == "the cat sat on the mat\n"  # one of the pairs that it was fine-tuned on
    named = "sft pairs.json --dpo --init=out/chat.npz --out_dir=corrected --batch_size=4"
    assert "checkpoint: corrected" in outcome(f"{named} --max_steps=2")
    moved = Path("pairs.json").rename("elsewhere.json")
    said = outcome("sft --dpo --init=out/chat.npz --out_dir=corrected")
    assert "pairs.json: out/chat.npz was fine-tuned on it, and it is not here" in said
    moved.rename("pairs.json")
    said = outcome("sft --dpo --init=out/base.npz --out_dir=corrected --data_dir=none --show=1")
    assert said.startswith("nothing keeps the other answers as they are")

def test_piped_questions_get_one_line_each(made):
    typed = f"where is the cat?\n\n{'X' * 96}\nOù?\nO\udcf9 in Latin-1?\nwho ran?\n"
    answers, errors, status = end(start("chat", PYTHONIOENCODING="utf-8:strict"), typed)
    assert re.fullmatch("the cat sat on the mat\n\n\n.*\n.*\nthe rat ran\n", answers)
    assert status == 0
    assert re.fullmatch("error: standard input:3: the question has .*\n"
                        "standard input:5: not all of it is UTF-8\n", errors)

def test_closed_and_narrow_streams_are_no_tracebacks(made):
    narrow = start("chat out/base.npz --prompt='café 東'", PYTHONIOENCODING="ascii")
    said, errors, status = end(narrow)
    assert said.startswith("caf? ?") and (errors, status) == ("", 0)
    if os.name != "nt":
        closed = start("chat --prompt=hi", 'exec "$@" <&- >&-')
        assert end(closed) == ("", "", 0)

TYPED = [  # what is typed at the prompt; what is found, by a regular expression, in what is shown
    ("", "/help for help"),
    ("WHO RAN?\n", "the rat ran"),
    ("/probs\n", "(?s)read as 'who ran.'.*% ' rat'.*% '<.end.>'"),
    ("/reset\n", "."),
    ("who rann?\n", "the rat ran"),
    ("/help\n", "/top_k"),
    ("/temperature -1\n", "must be from"),
    ("/better no rat\n", "1 corr"),
    ("where is\nthe cat?\n", "."),  # pasted: one question
    ("/better on a mat\n", "2 corr.*where is"),
    ("where is\x03", "(?s)^(?!.*sat)"),  # Ctrl-C: no answer
    ("/checkpoint y\n", "no command"),
    ("X" * 99 + "\n", "has 102 tokens"),
    ("/probs\n", "no answer"),
    ("/better y\n", "should have been"),
]

@only_posix
def test_at_a_terminal_one_can_correct_paste_interrupt_and_leave(made):
    # Python runs pty.spawn, which runs the command, Python once more, at a terminal.
    a_terminal = 'exec "$1" -c "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]))" "$@"'
    process = start("chat", a_terminal, TERM="dumb")
    for typed, expected in TYPED:
        for part in re.split("(?=\x03)", typed):
            print(part, end="", file=process.stdin, flush=True)
            time.sleep(0.5 * ("\x03" in typed))  # a signal just before Python waits is seen late
        said = ""
        while not said.endswith("\n> "):
            assert select.select([process.stdout], [], [], 60)[0], (typed, said)
            said += os.read(process.stdout.fileno(), 9999).decode()
        assert re.search(expected, said), said
    assert end(process, "\x04")[1:] == ("", 0)
    first, later = map(json.loads, Path("out/feedback.jsonl").read_text().splitlines())
    assert first == {"prompt": [user("who ran?")], "chosen": [assistant("no rat")],
                     "rejected": [assistant("the rat ran")]}
    assert later["prompt"][::2] == [user("who ran?"), user("where is\nthe cat?")]

def test_a_base_model_takes_no_corrections(monkeypatch, capsys):
    monkeypatch.setattr(chat, "typed", lambda: ["/better no rat"])
    chat.converse(None, chat.Config(), None)
    assert "a base model only continues texts" in capsys.readouterr().out

def steps_of(checkpoint):
    return gpt.load_checkpoint(checkpoint)[1]["step"]

def state_of(checkpoint):
    return gpt.load_checkpoint(checkpoint, to_resume=True)[0]

@only_posix
@parametrize("begin, path, signals, go_on", [
    param(BASE, "out/base.npz", ["SIGKILL", "SIGTERM"], "gpt --resume", id="base"),
    param(CHAT, "out/chat.npz", ["SIGINT"], "chat --prompt=hi", id="chat"),
    param(DPO, "out/dpo.npz", ["SIGKILL"], "sft --dpo --resume", id="dpo"),
])
def test_a_stopped_run_goes_on_to_the_same_bits_and_no_other_writes_there(
        made, begin, path, signals, go_on, tmp_path, monkeypatch):
    """All that `made` has is copied, with the finished run. Its command is run anew over that, is
    stopped by each signal in turn, and goes on to its end by go_on."""
    unstopped = Path(path).resolve()
    shutil.copytree(".", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("log*"))
    monkeypatch.chdir(tmp_path)
    path = Path(path)
    process = start(begin)
    for name in signals:
        assert any(line.startswith("step") for line in process.stdout)  # it has saved
        if name == "SIGKILL":
            assert "program that trains there" in outcome(f"gpt {TINY}")
        process.send_signal(getattr(signal, name))
        said, errors, status = end(process)
        step = steps_of(path)  # whole at every moment
        if name != "SIGKILL":
            says = f"interrupted at step {step}, saved .*go on with.* --resume"
            assert status == 130 and re.search(says, said), (said, errors)
        process = start(go_on)
    _, errors, status = end(process)
    assert status == 0
    assert errors == "" or begin == CHAT  # which says there that it goes on
    np.testing.assert_equal(state_of(path), state_of(unstopped))
    np.testing.assert_equal(read_log(gpt.log_of(path))[:, :4],  # without the times
                            read_log(gpt.log_of(unstopped))[:, :4])
    kept = path.with_suffix(".prev.npz")  # a fresh run keeps the one before it
    assert kept.read_bytes() == unstopped.read_bytes()

def test_the_best_model_is_kept_and_what_a_run_was_stands_beside_it(made):
    log = read_log("out/log.csv")
    best = np.nanargmin(log[:, 2])
    assert steps_of("out/base.best.npz") == log[best, 0]
    base, chat, dpo = map(json.loads, Path("out/runs.jsonl").read_text().splitlines())
    assert base["checkpoint"] == "base.npz" and dpo["checkpoint"] == "dpo.npz"
    assert (base["best_step"], base["val_loss"]) == (log[best, 0], log[best, 2])
    assert base["settings"]["block_size"] == 96
    assert f"lowest validation {base['val_loss']:.3f} " in made
    assert chat["val_loss"] is None  # nothing was held out
    assert dpo["val_loss"] == np.nanmin(read_log("out/log_dpo.csv")[:, 2])

def test_a_run_says_how_the_one_before_it_did(made):
    assert "of the run before" not in made
    write("again/log.csv", "step,val_loss\n1,\n2,1.5\n3,1.75\n")
    said = outcome(f"gpt {TINY} --max_steps=1 --out_dir=again")
    assert f"; of the run before 1.500 ({Path('again/log.prev.csv')})" in said

@only_posix
def test_a_run_whose_terminal_and_log_are_gone_goes_on(made):
    process = start(f"gpt {TINY} --max_steps=300 --eval_every=100 --out_dir=gone")
    assert any(line.startswith("step 100") for line in process.stdout)
    Path("gone/log.csv").unlink()
    Path("gone/log.csv").mkdir()
    process.send_signal(signal.SIGHUP)
    process.stdout.close()  # writing there is an error from now on
    assert process.wait() == 0 and process.stderr.read() == ""
    assert steps_of("gone/base.npz") == 300
    process.stderr.close()
    process.stdin.close()

def test_a_save_that_fails_is_tried_again_and_at_first_there_must_be_room(made, monkeypatch):
    full = OSError(28, "No space left on device")
    train = f"gpt {TINY} --max_steps=3 --eval_every=1 --out_dir=full"
    with monkeypatch.context() as patch:
        patch.setattr(gpt.shutil, "disk_usage", lambda folder: Mock(free=150_000))
        assert "base.npz: the disk has no room for two more of it" in outcome(train)
    # The first one; best and last after step 1; the best after step 2 fails, and the last is not
    # tried then; best and last after step 3.
    fourth_fails = [DEFAULT] * 3 + [full] + [DEFAULT] * 2
    save = Mock(wraps=gpt.save_checkpoint, side_effect=fourth_fails)
    monkeypatch.setattr(gpt, "save_checkpoint", save)
    said = outcome(train)
    assert "full/base.npz: not saved (No space left on device); the next validation tries" in said
    assert steps_of("full/base.npz") == 3

@only_posix
def test_a_checkpoint_that_is_a_link_stays_one_and_the_file_before_it_is_kept(tmp_path):
    real, linked = tmp_path / "real.npz", tmp_path / "sub" / "linked.npz"
    write(real, "old")
    linked.parent.mkdir()
    linked.symlink_to(real)
    for _ in range(2):
        prepare.keep_previous(linked)
        with prepare.whole_file(linked) as file:
            file.write(b"new")
    assert linked.is_symlink() and real.read_bytes() == b"new"
    assert linked.with_suffix(".prev.npz").read_bytes() == b"new"

@only_posix
def test_a_drive_without_locks_trains_with_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(37, "No locks available")))
    with prepare.only_writer(tmp_path):
        assert "no locks here" in capsys.readouterr().out

def test_a_narrow_terminal_keeps_one_line_of_progress(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    prepare.show_progress("x" * 99)
    assert len(capsys.readouterr().out) < 50 + len("\r\033[K")

@parametrize("texts", [
    param(["one two"] * 500 + ["eins zwei"] * 500, id="one language after the other"),
    param(["one two", "eins zwei"] * 500, id="two languages in turn"),
])
def test_the_tokenizer_learns_from_everywhere_in_a_long_text(texts, monkeypatch):
    monkeypatch.setattr(prepare, "ENOUGH", 100)
    lines = [json.dumps([text, True]) for text in texts]
    words = prepare.frequent_words(lines, 9000, 300)
    # 100 of 9,000 bytes: about 11 of the 1,000 lines
    assert 4 < words[" two"] < 8 and 4 < words[" zwei"] < 8

def test_a_base_goes_on_with_another_text_in_its_own_vocabulary(made):
    write("another.txt", "the hat sat on the cat, the mat ran 日本\n" * 99)
    for source in ("data/tokenizer.json", "out/base.npz"):
        said = outcome(f"prepare another.txt --out_dir=another --tokenizer={source}")
        assert said.endswith("next: python gpt.py --init out/base.npz --data_dir another\n")
    said = outcome("gpt --init=out/base.npz --data_dir=another --out_dir=gone_on --max_steps=1")
    assert "python sft.py PAIRS --init" in said and "--data_dir another --out_dir gone_on " in said
    assert "step 2/2" in outcome("gpt --resume --out_dir=gone_on --max_steps=2")  # the same text
    assert "another: another text than out" in outcome("gpt --resume --data_dir=another")

def test_questions_of_ones_own_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("data/qa.jsonl", "mine")
    write("data/qa_test.jsonl", '{"built_in": true}\n')
    write("text.txt", "one two three")
    assert "qa.jsonl: not made by prepare.py, so it stays" in outcome("prepare text.txt")
    assert sorted(path.name for path in Path("data").glob("qa*")) == ["qa.jsonl"]

@parametrize("context, n_messages", [(99, 4), (30, 2)])
def test_a_correction_whose_conversation_is_too_long_stands_alone(context, n_messages, tmp_path):
    path = tmp_path / "feedback.jsonl"
    asked = [user("the cat " * 9), assistant("a mat"), user("who ran?")]
    write(path, json.dumps({"prompt": asked, "chosen": "a rat", "rejected": "no"}))
    [example] = sft.corrections_in(path, TOKENIZER, context)
    assert len(example.chosen) == n_messages and example.chosen[-1].text == "a rat"

def test_a_correction_is_asked_in_the_same_other_words_each_time_and_its_old_answer_not_kept(made):
    corrections = [{"prompt": f"The capital of {x}?", "chosen": f"The capital of {x} is Zed.",
                    "rejected": "X"} for x in ("Qo", "Qu", "Ra", "Re", "Ri", "Ro", "Ru", "Sa")]
    write("eight.jsonl", "\n".join(map(json.dumps, corrections)))
    write("one.jsonl", json.dumps(corrections[0]))
    write("old.jsonl", '{"prompt": "The capital of Qo?", "response": "The old answer."}\n' * 20
          + '{"prompt": "Who?", "response": "Ho"}\n' * 99
          + f'{{"prompt": "Who?", "response": "{"long " * 99}"}}\n' * 50)
    pairs = sft.read_examples(["old.jsonl"])
    cfg = sft.Config(init="out/chat.npz")
    def examples_with(corrections):
        return sft.learn_preferences(cfg, pairs, [], corrections, [])[0]
    once = examples_with("eight.jsonl")
    assert examples_with("eight.jsonl") == once
    answers = [example.chosen[-1].text for example in once]
    assert "The old answer." not in answers and "The capital of Sa is Zed." in answers
    n_kept = answers.count("Ho")
    assert n_kept == approx(0.8 * len(once), rel=0.05)
    assert len(examples_with("one.jsonl")) - n_kept == (len(once) - n_kept) / 8
    assert len({example.chosen[0].text for example in once[n_kept:]}) > 5
    _, nothing = once[0].dialogues  # instead of an old answer nothing is rejected
    assert not any(message.trained for message in nothing)

def test_minutes_set_the_steps_by_the_pace_and_without_eval_every_nothing_is_validated(
        made, tmp_path, monkeypatch, capsys):
    twenty_of_a_second = [-30, *range(21)]  # when it was started and when 21 steps ended
    cfg = gpt.steps_in_time(gpt.Config(minutes=1), 21, twenty_of_a_second)
    assert cfg.max_steps == 31  # 10 seconds are left
    assert "--minutes 1: enough for about 31 steps" in capsys.readouterr().out
    said = outcome(f"gpt {TINY} --out_dir=timed --minutes=0.04 --eval_every=0")
    done = steps_of("timed/base.npz")
    assert done >= 3 and f"step {done}/{done} " in said
    assert np.isnan(read_log("timed/log.csv")[:, 2]).all()
    data = Path("data").resolve()
    shutil.copytree("timed", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    said = outcome(f"gpt --resume --data_dir={data} --minutes=0.01")
    assert steps_of("out/base.npz") > done and "--out_dir out " in said  # where it is now

# Skip this at first: that Apple's GPU is only given what it was seen to do. It reads StableHLO, in
# which a line such as
#     %4 = stablehlo.dot_general %2, %3, contracting_dims = [1] x [0] : tensor<4x16xf32>
# is allowed, and one with another operation, type or more than four axes is not:
#     %5 = stablehlo.gather ...     %6 = chlo.erf ...    tensor<4x16xbf16>    tensor<1x2x3x4x5xf32>
METAL_CAN = """dot_general add subtract multiply divide negate maximum minimum exponential log tanh
    rsqrt sqrt reduce broadcast_in_dim reshape transpose slice concatenate pad constant iota compare
    and or not select convert return""".split()
# What jax.random needs: jax#31286.
RANDOM = re.compile(r"stablehlo\.(xor|shift_left|shift_right_logical|bitcast_convert)\b")
UNSAFE = re.compile(rf"\b(stablehlo|chlo)\.(?!({'|'.join(METAL_CAN)})\b)"  # an operation
                    r"|tensor<(\d+x){5}|tensor<(\d+x)*(?!f32|i32|i1\b)[a-z]")  # a shape or type
# jax#25302: a transpose of a broadcast.
TURNED = re.compile(r"(%\w+) = stablehlo\.broadcast_in_dim.*stablehlo\.transpose \1,", re.S)

def not_for_metal(text):
    """Lines that Metal has not been seen to run, and functions that transpose a broadcast."""
    text = re.sub(r"array<i64|sdy\.mesh.*", "", text)  # an attribute, and where the devices are
    if RANDOM.search(text):  # with dropout: jax.random's operations and types are seen to run too
        text = RANDOM.sub("stablehlo.add", text)
        text = re.sub(r"\bui(32|64)\b", "i32", re.sub(r"xui(32|64)\b", "xi32", text))
    lines = filter(UNSAFE.search, text.splitlines())
    functions = filter(TURNED.search, text.split("func.func"))  # in each names begin anew
    return [*lines, *functions]

@parametrize("platforms", [("METAL",), ("cuda", "tpu")])
def test_all_that_is_compiled_lowers_everywhere_and_is_what_metal_can_do(
        made, platforms, monkeypatch):
    """Nothing is compiled or computed here: trace() only follows what happens to the shapes,
    lower() gives the program as text, and all results are ones."""
    real_jit = jax.jit
    texts = set()  # as XLA is given it
    def jit(f, **options):
        jitted = real_jit(f, **options)
        def call(*args):
            traced = jitted.trace(*args)
            texts.add(traced.lower(lowering_platforms=platforms).as_text())
            return tree.map(lambda a: np.ones(a.shape, a.dtype), traced.out_info)
        return call
    monkeypatch.setattr(jax, "jit", jit)
    monkeypatch.setattr(gpt, "QUERIES", 30)
    monkeypatch.setattr(gpt, "on_metal", lambda: "METAL" in platforms)
    for run in (f"gpt {TINY} --grad_accum=2 --dtype=bfloat16 --dropout=0.1",
                "sft pairs.json --init=out/base.npz", "sft --dpo=prefs.json --init=out/chat.npz"):
        said = outcome(f"{run} --max_steps=1 --eval_every=1 --out_dir=lowered")
        assert "checkpoint: lowered" in said, said
    unsafe = " ".join(line for text in texts for line in not_for_metal(text))
    if "METAL" in platforms:
        assert unsafe == "" and len(texts) > 10
        # In the run with dropout: its gradient, and that of the check.
        assert len([*filter(RANDOM.search, texts)]) == 2
    else:  # the check sees what it must not let through
        for word in ("stablehlo.gather", "stablehlo.scatter", "bf16"):
            assert word in unsafe
    assert not_for_metal("%0 = chlo.square %x")
    assert not_for_metal("%1 = stablehlo.broadcast_in_dim %x\n%2 = stablehlo.transpose %1, dims")

right_gradient = cache(gpt.small_gradient)

@parametrize("factor, problem", [
    param(1, "", id="it agrees"),
    param(-1, "gradients", id="another sign"),
    param("", "Error", id="it cannot run"),  # nor can "" be multiplied
    param(np.nan, "gradients", id="NaN"),
])
def test_a_gpu_of_apples_is_trusted_only_if_it_agrees_with_the_cpu(
        factor, problem, monkeypatch, capsys):
    cpu, gpu, *_ = jax.devices("cpu")
    def small_gradient(where, dropout):
        gradient = right_gradient(where, dropout).copy()
        if where == gpu:
            gradient[:4 * 128 * 128] *= factor  # only that of wo and wqkv, the first numbers
        return gradient
    monkeypatch.setattr(gpt, "on_metal", lambda: gpt.device() == gpu)
    monkeypatch.setattr(gpt, "small_gradient", small_gradient)
    jax.config.update("jax_default_device", gpu)
    gpt.check_device()
    assert gpt.device() == (cpu if problem else gpu)
    jax.config.update("jax_default_device", None)
    said = capsys.readouterr().err
    assert said.startswith(f"{gpu} is not used, all runs on the CPU") == bool(problem)
    assert problem in said

def test_a_damaged_checkpoint_is_refused_or_whole_and_none_is_written_that_is_not_finite(
        made, monkeypatch):
    path = Path("damaged.npz")
    arrays = {**np.load("out/base.npz")}
    gain = arrays["params.norm"]
    for wrong in (gain * np.float32(np.nan), gain[1:], gain.astype(np.float64)):
        np.savez(path, **arrays | {"params.norm": wrong})
        assert "checkpoint (params.norm" in outcome("chat damaged.npz")
    state = state_of("out/base.npz")
    whole = Path("out/base.npz").read_bytes()
    for place in np.random.default_rng(0).integers(len(whole), size=60):
        rest = bytes([whole[place] ^ 1]) + whole[place + 1:] if place % 2 else b""
        path.write_bytes(whole[:place] + rest)
        with suppress(InputError):
            np.testing.assert_equal(state_of(path), state)
    wild = "--out_dir=wild --learning_rate=1e9 --weight_decay=1e9 --warmup=0 --eval_every=1"
    assert "smaller --learning_rate" in outcome(f"gpt {TINY} {wild}")
    gpt.load_checkpoint("wild/base.npz")
    monkeypatch.setattr(gpt, "VERSION", 9)
    assert "made by another version of gpt.py" in outcome("chat out/base.npz")

BAD_FILES = {
    "pdf": "%PDF-1.7\n", "rtf": "{\\rtf1", "html": "\n<!-- x --><!DOCTYPE html>", "docx": "PK\3\4",
    "table.parquet": "PAR1", "x.xz": "\udcfd7zXZ", "x.zst": "\x28\udcb5\x2f\udcfd",
    "code/a.py": "pass", "pairs.json": '{"prompt": "a", "response": "b"}', "empty": "",
    "binary": "a\0b", "notepad.txt": "\udcff\udcfeh\0i\0", "short": "a", "latin": LATIN,
    "cut": "\x1f\udc8b\x08\0", "cut.json": '[{"prompt": "a"',
    "odd/train.bin": "abc" * 99, "odd/tokenizer.json": TOKENIZER.to_json(),
    "foreign/tokenizer.json": "{}"}
NO_UTF8 = "not UTF-8; try iconv"
NO_CHECKPOINT = "no whole checkpoint"
NO_QUESTION = "no question with an answer"
REFUSED = [  # a command; its error, by a regular expression
    # Files
    ("prepare missing", "missing: No such file"),
    ("sft missing.json", "missing.json: No such file"),
    ("prepare empty", "too little text: 0 tokens"),
    ("prepare short", "too little text: 2 tokens"),
    ("prepare cut", "cut:1: damaged"),
    ("prepare pdf", "pdf: a PDF, not text; try: pdftotext"),
    ("prepare rtf", "RTF, not text; try: pandoc"),
    ("sft html", "HTML, not text; try: pandoc"),
    ("prepare docx", "a zip archive, as .docx and .epub"),
    ("prepare table.parquet", "parquet, not text; .*read_parquet"),
    ("prepare x.xz", "packed by xz.*: xzcat x.xz"),
    ("prepare x.zst", "packed by zstd.*: zstdcat x.zst"),
    ("prepare code", "a folder without text files.*: code/[*]"),
    ("prepare pairs.json", "too little text: 0 tokens; left out: .*sft.py.*pairs.json:1"),
    ("prepare binary", "binary: not text"),
    ("prepare notepad.txt", "UTF-16, not text; try: iconv"),
    ("prepare latin", f"latin: {NO_UTF8}"),
    ("sft empty", f"empty: {NO_QUESTION}"),
    ("sft text.jsonl --dpo", f"text.jsonl: {NO_QUESTION}"),
    ("sft cut.json", "cut.json: no q.* not JSON"),
    ("gpt --data_dir=odd", "odd.train.bin: damaged"),
    ("gpt --data_dir=foreign", "not a tokenizer"),
    ("gpt --init=text.jsonl", f"text.jsonl: {NO_CHECKPOINT} .File is not a zip"),
    ("gpt --resume --out_dir=nowhere", "base.npz: No such file"),
    ("chat none.npz", "none.npz: No such file"),
    # Settings
    ("prepare text.jsonl --vocab_size=3", "--vocab_size 3: must be from 259 to 65536"),
    ("gpt --learning_rate=nan", "--learning_rate nan: must be from 0 to 1"),
    ("chat --top_p=2", "--top_p 2.0: must be from 0 to 1"),
    ("gpt --n_layr 6", r"did you mean --n_layer\?"),
    ("gpt --n_embd=30", "multiple of 2 x n_head"),
    ("gpt --block_size=5000", "5001 needed"),
    # What does not go together
    ("prepare text.jsonl --tokenizer=out/base.npz --vocab_size=300",
     "--tokenizer has its vocabulary"),
    ("gpt --init=out/base.npz --data_dir=odd", "another vocab"),
    ("gpt --init=out/base.npz --n_layer=2", "begun with 1"),
    ("gpt --resume --seed=7", "begun with 0"),
    ("sft --dpo --resume --seed=7", "begun with 0"),
    ("sft --resume", "with other"),  # there is another pairs.json now
    ("sft other.jsonl --resume", "begun with .*pairs"),
    ("sft --dpo=prefs.json --init=out/dpo.npz", "would be overwritten"),
    ("sft --dpo --out_dir=nowhere", "no nowhere.feedback.jsonl: /better in the chat"),
]

def content_of_all_files():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

@parametrize("command, message", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line_and_changes_nothing(made, command, message):
    for name, text in BAD_FILES.items():
        write(name, text)
    before = content_of_all_files()
    assert re.match(f"error: .*{message}", outcome(command))
    assert content_of_all_files() == before

@only_posix
@parametrize("shell, message", [
    param('exec "$@" --coordinator=here', "here: HOST:PORT.*", id="no port"),
    param('ulimit -f 16; exec "$@"', "File too large", id="no file beyond 16 blocks"),
])
def test_a_process_that_cannot_train_ends_in_one_line_and_changes_nothing(made, shell, message):
    before = content_of_all_files()
    _, errors, status = end(start(f"gpt {TINY}", shell))
    assert re.fullmatch(f"error: .*{message}\n", errors) and status == 2
    assert content_of_all_files() == before

def test_two_processes_train_as_one_and_fall_together(made):
    """With split parameters; when one is killed the other ends, and both go on as one process."""
    train = f"gpt {TINY} --max_steps=12 --eval_every=4 --learning_rate=4e-4 --dtype=float32"
    one_device_each = ("--xla_force_host_platform_device_count=1"
                       " --xla_backend_optimization_level=0")  # compiled in half the time
    def start_both(flags=""):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        join = f"--shard_params --coordinator=127.0.0.1:{port} --num_processes=2 --process_id="
        run = f"{train} --out_dir=halves {flags} {join}"
        return [start(f"{run}{i}", XLA_FLAGS=one_device_each) for i in "01"]
    first, second = start_both()
    assert any(line.startswith("step") for line in first.stdout)  # it has saved
    second.kill()
    if jax.__version_info__ <= (0, 5, 0):  # these do not notice, and can hang
        first.kill()
    assert end(first)[2] and end(second)[2]
    assert [end(process)[2] for process in start_both("--resume")] == [0, 0]
    outcome(f"{train} --out_dir=one")
    losses, same = read_log("halves/log.csv")[:, :3], read_log("one/log.csv")[:, :3]
    np.testing.assert_allclose(losses, same, atol=1e-4)
    assert_close(state_of("halves/base.npz"), state_of("one/base.npz"), 1e-3)

def test_the_built_in_questions_never_tell_what_is_tested(monkeypatch):
    full, train, test = built_in_corpus(0)
    without_b, same, _ = built_in_corpus(0, tell_b=False)
    assert same == train
    assert len(without_b) < len(full)
    monkeypatch.setattr(world, "conversation", lambda pools: None)  # they take the time
    assert built_in_corpus(1)[0] != full
    told = {message["content"] for record in train for message in record["messages"]}
    for record in test:
        assert not record["set"].startswith("B") or record["response"] not in told
        new = "new wording" in record["set"] or record["set"].startswith("in haste")
        assert not new or record["instruction"] not in told

@parametrize("statement", [
    param("The capital of Qo is zed.", id="a capital"),
    param("On the map, Qo is in Asia.", id="a continent, with words before it"),
])
def test_a_correction_is_half_the_time_asked_in_other_words(statement):
    world.rng.seed(0)
    asked = [reworded("same", statement) for _ in range(400)]
    assert asked.count("same") == approx(200, abs=40)
    others = {question.lower() for question in asked} - {"same"}
    assert len(others) > 30
    for question in others:
        assert "qo" in question and not re.search("zed|on the map, qo", question)

def test_where_a_capital_is_never_counts_as_unknown_after_a_question_about_a_continent():
    pools = {name: [("Lima", "country")] for name in world.SHARES}
    asked = {world.next_question("Peru", "continent", pools) for _ in range(300)}
    assert len(asked) > 3 and not any(world.is_ambiguous(x, a) for x, a, _ in asked)

def test_the_control_tells_no_name_of_the_test_and_no_word_of_bs_is_trained_as_unknown(monkeypatch):
    monkeypatch.setattr(world, "tell", lambda x, attributes, n: [x] * n)
    world.rng.seed(0)
    told, train, test = world.divide(tell_b=False)
    assert not {x for x, _ in test["U, nowhere, real"] + test["B"]} & {*told}
    trained = " ".join(x for x, _ in train["U, nowhere, real"] + train["U, mentioned"])
    assert not {*trained.split()} & {word for x, _ in test["B"] for word in x.split()}

def test_no_made_up_name_is_a_real_one(monkeypatch):
    world.rng.seed(0)
    name = world.made_up("place")
    monkeypatch.setattr(world, "TAKEN", {name.lower()})
    world.rng.seed(0)
    assert world.made_up("place") != name
