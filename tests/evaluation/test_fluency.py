"""Free texts of COUNTERFACT's kind: what is sampled, how rich it is, and how close to texts about the target."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pmet_lightning.data.chat import ChatFrame
from pmet_lightning.data.corpus import CorpusError
from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.evaluation import consistency as references_module
from pmet_lightning.evaluation import fluency as module
from pmet_lightning.evaluation.consistency import References
from pmet_lightning.evaluation.fluency import fluency, ngram_entropy, sample_texts
from pmet_lightning.model.loading import load_model
from tests.tiny import RECORDS, save_tiny

CPU = torch.device("cpu")
PROMPTS = [r["prompt"].replace("{}", r["subject"]) for r in RECORDS]


def _slow_words(text):
    words, word = [], ""
    for character in text + " ":
        if character.isalnum() or character == "_":
            word += character
            continue
        words += [word] * bool(word) + [character] * (not character.isspace())
        word = ""
    return words


def _slow_entropy(text, n):
    words = _slow_words(text)
    grams = [" \0 ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    frequencies = [count / len(grams) for count in Counter(grams).values()]
    return -sum(f * math.log2(f) for f in frequencies)


def _slow_fluency(texts):
    return sum(_slow_entropy(t, 2) / 3 + 2 * _slow_entropy(t, 3) / 3 for t in texts) / len(texts)


@pytest.mark.parametrize(
    ("text", "two", "three"),
    [
        ("a b c d e", 2.0, math.log2(3)),  # 4 different pairs, 3 different triples
        ("a a a a a a", 0.0, 0.0),
        ("a b a b a", 1.0, 2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3)),
        ("one, two", 1.0, 0.0),  # the comma is a word
        ("A a A", 1.0, 0.0),  # case counts
        ("one", 0.0, 0.0),
        (" \n", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_entropy_by_hand(text, two, three):
    assert math.isclose(ngram_entropy(text, 2), two, abs_tol=1e-12)
    assert math.isclose(ngram_entropy(text, 3), three, abs_tol=1e-12)
    assert math.isclose(fluency([text]), two / 3 + 2 * three / 3, abs_tol=1e-12)
    assert math.copysign(1, ngram_entropy(text, 2)) == 1  # no -0.0 in a table


def test_fluency_is_the_mean_over_texts():
    texts = ["a b c d e", "It's here, isn't it? It's here.", "1.5 % of \u00fcber_alles \u2014 \u6771\u4eac"]
    assert math.isclose(fluency(texts), sum(fluency([t]) for t in texts) / 3)
    assert math.isclose(fluency(texts), _slow_fluency(texts))
    assert math.isnan(fluency([]))


def test_fluency_of_real_prompts(shared):
    records = json.loads((shared / "data" / "counterfact_250.json").read_text())
    joined = [" ".join(r["generation_prompts"] + r["attribute_prompts"]) for r in records]
    assert all(math.isclose(ngram_entropy(t, n), _slow_entropy(t, n)) for t in joined for n in (1, 2, 3))
    assert math.isclose(fluency(joined), _slow_fluency(joined))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def loaded(request, tmp_path_factory):
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    return load_model(folder, "float32"), load_tokenizer(folder)


def _sampled(loaded, prompts=PROMPTS, budget=4096, **kw):
    model, tokenizer = loaded
    return sample_texts(model, PromptEncoder(tokenizer), prompts, tokens_per_batch=budget, device=CPU, **kw)


def _slow_text(model, tokenizer, prompt, length, noise):
    """The whole text again for every token, one prompt at a time, without generate."""
    ids = tokenizer(prompt).input_ids
    start = len(ids)
    while len(ids) < length:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].tolist()
        best = sorted(range(len(logits)), key=lambda token: -logits[token])[: noise.shape[1]]
        shifted = [logits[token] + float(noise[len(ids) - start, rank]) for rank, token in enumerate(best)]
        ids.append(best[int(np.argmax(shifted))])
    return prompt + tokenizer.decode(ids, skip_special_tokens=True)[len(prompt) :], ids


def test_texts_as_said_one_by_one(loaded):
    found = _sampled(loaded, PROMPTS[:4], length=28, seed=3)
    noise = module.noise_tables(PROMPTS[:4], [28] * 4, 5, 3, None)
    expected = [_slow_text(*loaded, prompt, 28, table)[0] for prompt, table in zip(PROMPTS, noise, strict=False)]
    assert found == expected
    assert found != _sampled(loaded, PROMPTS[:4], length=28, seed=4)


def test_the_batch_changes_nothing(loaded):
    expected = _sampled(loaded, length=30)
    assert all(text.startswith(prompt) for text, prompt in zip(expected, PROMPTS, strict=True))
    for budget in (1, 70, 100):
        assert _sampled(loaded, budget=budget, length=30) == expected
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(1)).tolist()
    assert _sampled(loaded, [PROMPTS[i] for i in order], length=30) == [expected[i] for i in order]


def test_equal_prompts_are_sampled_anew_within_a_record(loaded):
    """COUNTERFACT asks a prompt several times, and several records ask about one subject."""
    first, second = _sampled(loaded, [PROMPTS[0]] * 2, length=30)
    assert first != second
    mixed = _sampled(loaded, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0]], groups=["b", "a", "a", "a"], length=30)
    assert [mixed[0], mixed[1], mixed[3]] == [first, first, second]
    assert _sampled(loaded, []) == []


def test_global_generators_are_left_alone(loaded):
    before = torch.get_rng_state()
    _sampled(loaded, PROMPTS[:1], length=12)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("budget", [1, 4096])
def test_lengths(loaded, budget, monkeypatch):
    """Counted in tokens, the prompt's included."""
    counts, real = [], module.continuation

    def spy(encoder, prompt_ids, ids):
        counts.append((len(prompt_ids), len(prompt_ids) + len(ids)))
        return real(encoder, prompt_ids, ids)

    monkeypatch.setattr(module, "continuation", spy)
    _sampled(loaded, budget=budget, length=25)
    assert len({prompt for prompt, _ in counts}) > 1
    assert [total for _, total in counts] == [25] * len(PROMPTS)


def test_long_prompts_come_back_and_positions_are_never_exceeded(loaded):
    model, tokenizer = loaded
    long, short = " ".join(PROMPTS), PROMPTS[0]
    tokens = len(tokenizer(long).input_ids)
    assert 60 < tokens < 128
    assert _sampled(loaded, [long, short], length=tokens)[0] == long
    assert _sampled(loaded, [long], length=tokens + 1) != [long]
    beyond = " ".join(PROMPTS * 2)
    assert len(tokenizer(beyond).input_ids) > 128
    found = _sampled(loaded, [beyond, long, short], length=1000)  # GPT-2 has a table of 128 positions
    assert found[0] == beyond
    noise = module.noise_tables([long], [1000], 5, 0, None)[0]
    expected, ids = _slow_text(model, tokenizer, long, 128, noise)
    assert len(ids) == 128
    assert found[1] == expected
    assert found[2] == _sampled(loaded, [short], length=1000)[0]


class _Fixed(nn.Module):
    """A model that says one token, with fixed logits, through the public generation interface."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.generation_config = torch.tensor(logits), None
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=None))

    def get_output_embeddings(self):
        return nn.Identity()

    def generate(self, *, input_ids, logits_processor, max_new_tokens, do_sample, **_):
        assert not do_sample
        for _ in range(max_new_tokens):
            scores = logits_processor(input_ids, self.logits.expand(len(input_ids), -1))
            input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=1)
        return input_ids


def _frequencies(seeds, noise=None):
    logits = [-3.0, 1.0, 0.2, 1.7, -0.5, 0.0, -9.0]
    encoder = SimpleNamespace(
        chat=None, pad_id=0, encode=lambda _: SimpleNamespace(ids=[0], labels=(), subject=-1),
        decode=lambda ids: "".join(map(str, ids)),
    )  # fmt: skip
    said = Counter()
    with pytest.MonkeyPatch.context() as patch:
        if noise is not None:
            patch.setattr(module, "noise_tables", noise)
        for seed in seeds:
            texts = sample_texts(
                _Fixed(logits), encoder, ["a", "b"], length=2, seed=seed, tokens_per_batch=64, device=CPU
            )
            said.update(int(text[-1]) for text in texts)
    top = torch.tensor(logits).topk(5)
    expected = dict(zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True))
    total = said.total()
    assert set(said) <= set(expected)
    return sum((said[token] - total * p) ** 2 / (total * p) for token, p in expected.items())


def test_first_tokens_are_samples_of_the_top_k():
    """Chi-square with 4 degrees of freedom: 18.5 is exceeded once in a thousand."""
    assert _frequencies(range(1500)) < 18.5


def test_the_check_on_samples_can_fail():
    def half(prompts, steps, top_k, seed, groups):
        return [0.5 * table for table in module_tables(prompts, steps, top_k, seed, groups)]

    module_tables = module.noise_tables
    assert _frequencies(range(1500), half) > 100


def test_a_real_model_s_first_token(loaded):
    """The same on a tiny model, all seeds in one batch by way of equal prompts."""
    model, tokenizer = loaded
    ids = tokenizer(PROMPTS[0]).input_ids
    found = Counter(_sampled(loaded, [PROMPTS[0]] * 3000, length=len(ids) + 1, budget=10**6))
    with torch.no_grad():
        top = model(torch.tensor([ids])).logits[0, -1].topk(5)
    probabilities = Counter()
    for token, p in zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True):
        probabilities[PROMPTS[0] + tokenizer.decode([token], skip_special_tokens=True)] += p
    assert set(found) <= set(probabilities)
    assert max(abs(found[text] / 3000 - p) for text, p in probabilities.items()) < 0.035


def test_the_model_s_own_settings_rest_and_return(loaded):
    """Its end-of-text token ends nothing, its penalties do not count, and all stays as it was."""
    model, tokenizer = loaded
    expected = _sampled(loaded, length=40)
    own = model.generation_config
    ends = Counter(id_ for text in expected for id_ in tokenizer(text).input_ids)
    settings = {"eos_token_id": [id_ for id_, _ in ends.most_common(40)], "repetition_penalty": 1.5}
    before = {name: getattr(own, name) for name in settings}
    try:
        own.update(**settings)
        state = own.to_dict()
        assert _sampled(loaded, length=40) == expected
        assert model.generation_config is own
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "forward", _broken)
            with pytest.raises(RuntimeError, match="broken"):
                _sampled(loaded, length=40)
        assert model.generation_config is own
        assert own.to_dict() == state
    finally:
        own.update(**before)


def _broken(*_, **__):
    raise RuntimeError("broken")


def test_end_of_text_is_left_out(loaded):
    """A model that says nothing else says nothing."""
    model, tokenizer = loaded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TopKGumbel", lambda *_: _only_end)
        assert _sampled(loaded, length=20) == PROMPTS


def _only_end(input_ids, scores):
    return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([0]), 0.0)


def test_a_chat_s_template_is_no_text(loaded):
    """It does not count among the tokens, and is not in the text; the answer is set off by a space."""
    model, tokenizer = loaded
    bare = PromptEncoder(tokenizer)
    chat = PromptEncoder(tokenizer, ChatFrame("The user asks about it: ", " The answer is"))
    prompt = PROMPTS[0]
    (found,) = sample_texts(model, chat, [prompt], length=20, tokens_per_batch=99, device=CPU)
    framed = f"The user asks about it: {prompt} The answer is"
    extra = len(bare.encode(framed).ids) - len(bare.encode(prompt).ids)
    (table,) = module.noise_tables([prompt], [20], 5, 0, None)
    expected, _ = _slow_text(model, tokenizer, framed, 20 + extra, table)
    assert found == f"{prompt} {expected.removeprefix(framed).lstrip()}"


def test_the_space_between_prompt_and_text_stays(shared):
    """SentencePiece tokenizers drop it from what they decode on its own."""
    folder = str(shared / "data" / "models" / "stories260K")
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    prompts = ["One day, Lily went to", "The little dog was very"]
    found = sample_texts(model, PromptEncoder(tokenizer), prompts, length=60, tokens_per_batch=999, device=CPU)
    for prompt, text in zip(prompts, found, strict=True):
        table = module.noise_tables([prompt], [60], 5, 0, None)[0]
        assert text == _slow_text(model, tokenizer, prompt, 60, table)[0]
        assert text[len(prompt)].isspace()
    assert 2 < fluency(found) < math.log2(60)


TEXTS = [
    "Paris is the capital of France, and Paris is large.",
    "The Parisian cafes are in a city of France.",
    "New York is a city. A new York was built.",
    "Ice hockey is a sport (ice hockey!) of Canada.",
    "The vitamin C in lemons keeps sailors well.",
    "paris in lower case, a city too",
    "A city in Paris, Texas.",
    "A nice hockey match, then ice.",
]
SAID = ["Lyon is a city of France. It is", "The capital of Canada is large and new"]


def _slow_cosine(first, second, idf):
    """By hand: counts times idf, both of length 1."""
    vectors = []
    for text in (first, second):
        counts = Counter(re.findall(r"\w\w+", text.lower()))
        vector = np.array([counts[word] * weight for word, weight in sorted(idf.items())])
        vectors.append(vector / np.linalg.norm(vector))
    return float(vectors[0] @ vectors[1])


def _slow_idf(texts):
    documents = [set(re.findall(r"\w\w+", text.lower())) for text in texts]
    counts = Counter(word for document in documents for word in document)
    return {word: math.log((1 + len(texts)) / (1 + count)) + 1 for word, count in counts.items()}


def _ask(references, target="", relation=None, target_id=None, texts=SAID):
    return references.consistency(texts, target=target, relation=relation, target_id=target_id)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_consistency_with_a_corpus(tmp_path, suffix):
    path = tmp_path / f"texts{suffix}"
    rows = {
        ".txt": TEXTS,
        ".jsonl": [json.dumps({"text": t}) for t in TEXTS],
        ".csv": ["text", *(f'"{t}"' for t in TEXTS)],
    }
    path.write_text("\n".join(rows[suffix]))
    references = References.of(str(path))
    assert references.label == f"texts of {path} that name the target"
    idf, said = _slow_idf(TEXTS), " ".join(SAID)
    named_by = {
        "Paris": (0, 6),
        " Paris": (0, 6),
        "New York": (2,),
        "C": (4,),
        "city": (1, 2, 5, 6),
        "ice hockey": (3,),
    }
    for target, named in named_by.items():
        expected = _slow_cosine(said, " ".join(TEXTS[i] for i in named), idf)
        for _ in range(2):  # the second from the cache
            assert math.isclose(_ask(references, target), expected, rel_tol=1e-9)
    assert _ask(references, "Paris", texts=["zebra"]) == 0
    for target in ("Berlin", "York New", "ice-hockey", "paris.", "D", "+", "", " "):
        assert math.isnan(_ask(references, target))
    assert math.isnan(_ask(references, "Paris", texts=[]))


def test_a_hundred_references_are_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(references_module, "MOST_REFERENCES", 2)
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(f"Oslo word{i}" for i in range(9)))
    references = References.of(str(path))
    found = references._naming("Oslo")
    assert found == references._corpus[:2]
    monkeypatch.setattr(references_module, "MOST_TEXTS", 4)
    assert len(References.of(str(path))._corpus) == 4


SNIPPETS = [
    {"relation_id": "P1", "target_id": "Q1", "samples": [{"target": "x", "name": "y", "text": t} for t in TEXTS[:2]]},
    {"relation_id": "P1", "target_id": "Q2", "samples": [{"target": "x", "name": "y", "text": TEXTS[2]}]},
    {"relation_id": "P2", "target_id": "Q1", "samples": [{"target": "x", "name": "y", "text": TEXTS[3]}]},
    {"relation_id": "P1", "target_id": "Q1", "samples": [{"target": "x", "name": "y", "text": TEXTS[6]}]},
    {"relation_id": "P1", "target_id": "Q3", "samples": []},
]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("by_file", [False, True])
def test_consistency_with_counterfact_s_texts(tmp_path, given, by_file):
    path = tmp_path / "attribute_snippets.json"
    path.write_text(json.dumps(SNIPPETS))
    idf = _slow_idf([*TEXTS[:4], TEXTS[6]])
    if given:
        idf = {word: 1.0 + i % 3 for i, word in enumerate(sorted(idf))}
        words = list(idf)[::-1]
        np.save(tmp_path / "idf.npy", np.array([idf[word] for word in words]))
        (tmp_path / "tfidf_vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    references = References.of(str(path if by_file else tmp_path))
    assert references.label == "COUNTERFACT's reference texts"
    said = " ".join(SAID)
    for (relation, target_id), named in {("P1", "Q1"): (0, 1, 6), ("P1", "Q2"): (2,), ("P2", "Q1"): (3,)}.items():
        expected = _slow_cosine(said, " ".join(TEXTS[i] for i in named), idf)
        assert math.isclose(_ask(references, "ignored", relation, target_id), expected, rel_tol=1e-9)
    for relation, target_id in [("P1", "Q3"), ("P2", "Q2"), (None, "Q1"), ("P1", None), (None, None)]:
        assert math.isnan(_ask(references, "Paris", relation, target_id))
    assert math.isnan(_ask(references, "Paris", "P1", "Q1", texts=[]))


def test_missing_references_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"attribute_snippets\.json; expected .* or give a corpus"):
        References.of(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no file .*attribute_snippets\.json"):
        References.of(str(tmp_path / "attribute_snippets.json"))


def test_a_missing_corpus_says_what_to_do(monkeypatch):
    def nowhere(*_):
        raise FileNotFoundError("set --moments.corpus")
        yield

    monkeypatch.setattr(references_module, "corpus_texts", nowhere)  # the real one asks the hub, and waits for it
    with pytest.raises(FileNotFoundError, match=r"no reference texts 'nobody/nothing'.*leave the consistency out"):
        References.of("nobody/nothing")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", r"snippets\.json: malformed \(JSONDecodeError"),
        ("5", r"snippets\.json: malformed \(TypeError"),
        ("[1]", "entry 0: malformed"),
        (
            json.dumps([*SNIPPETS, {"relation_id": "P1", "target_id": "Q1"}]),
            r"entry 5: malformed \(KeyError\('samples'\)",
        ),
        ("[]", "no words in its 0 texts"),
    ],
)
def test_malformed_snippets_say_where(tmp_path, content, complaint):
    (tmp_path / "attribute_snippets.json").write_text(content)
    with pytest.raises(CorpusError, match=complaint):
        References.of(str(tmp_path))


@pytest.mark.parametrize(
    ("idf", "vocabulary"),
    [
        ([1.0], '{"a": 0, "b": 1}'),
        (["x"], '{"a": 0}'),
        ([math.nan], '{"a": 0}'),
        ([1.0], "5"),
        ([1.0], "{"),
        (None, "{}"),
    ],
)
def test_a_malformed_vocabulary_says_where(tmp_path, idf, vocabulary):
    (tmp_path / "attribute_snippets.json").write_text(json.dumps(SNIPPETS))
    (tmp_path / "tfidf_vocab.json").write_text(vocabulary)
    (tmp_path / "idf.npy").write_bytes(b"")
    if idf is not None:
        np.save(tmp_path / "idf.npy", np.array(idf))
    with pytest.raises(CorpusError, match=r"idf\.npy and tfidf_vocab\.json: unusable .*Download both again"):
        References.of(str(tmp_path))


def test_a_corpus_without_words_says_so(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("! !\n? ?\n")
    with pytest.raises(CorpusError, match=r"texts\.txt: no words in its 2 texts"):
        References.of(str(path))
