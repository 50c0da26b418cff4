"""Texts and their splits, tokenizers, the n-gram baseline, and the tasks on held-out text."""

from __future__ import annotations

import itertools
import json
import math
import os

import pytest
import torch

from zoo.errors import ConfigError, DataError, UnknownNameError
from zoo.harness.tasks import get_task
from zoo.llm import data
from zoo.llm.data import EMBEDDED, corpus, pack_embedded
from zoo.llm.data.tokenization import END, packaged, token_stream, tokenizer_of, train_bpe
from zoo.llm.models import llama
from zoo.llm.ngram import KneserNey
from zoo.llm.scoring import Scored, document_nats, sequence_nats
from zoo.llm.tasks import ClozeEmbedded, perplexity_result

WITH_DATA = pytest.mark.skipif(not os.environ.get("ZOO_DATA"), reason="the text is in ZOO_DATA")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return llama(1024, 32, 48, layers=2, heads=4, kv_heads=2, context=32, tokenizer="shakespeare").eval()


@pytest.mark.parametrize(
    "name",
    ["embedded", *(pytest.param(n, marks=WITH_DATA) for n in ("shakespeare", "tinystories", "wikitext2"))],
)
def test_no_document_is_in_two_splits(name):
    found = corpus(name)
    splits = [set(found.split(part)) for part in ("train", "validation", "test")]
    for left, right in itertools.combinations(splits, 2):
        assert not left & right
    assert sum(map(len, splits)) == sum(len(found.split(part)) for part in ("train", "validation", "test"))
    assert all(document.strip() == document and document for part in splits for document in part)


def test_the_packaged_text_is_whole_plays_and_small():
    found = corpus("embedded")
    assert EMBEDDED.stat().st_size <= 300_000
    assert found.test[0].startswith("LUCENTIO:\nTranio, since") and found.validation[0].startswith("Master:")
    speakers = {line for text in found.train for line in text.splitlines() if line == "PETRUCHIO:"}
    assert not speakers  # he is in the test play alone


@WITH_DATA
def test_texts_have_their_published_sizes():
    from pathlib import Path

    text = (Path(os.environ["ZOO_DATA"]) / "text" / "tinyshakespeare.txt").read_text()
    assert pack_embedded(text) == EMBEDDED.read_bytes()
    wiki = corpus("wikitext2")
    assert len(wiki.test) == 62 and len(wiki.train) + len(wiki.validation) == 60
    assert sum(map(data.words, wiki.test)) == 241_211  # 245,569 tokens less one end mark for each line


def test_unknown_missing_and_changed_texts_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="embedded"):
        corpus("embeded")
    with pytest.raises(DataError, match="splits train, validation and test"):
        corpus("embedded").split("dev")
    data._known.cache_clear()
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    with pytest.raises(DataError, match="Set ZOO_DATA.*`embedded` needs no file"):
        corpus("tinystories")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tinystories-2MiB.txt").write_text("Once upon a time.\n<|endoftext|>\n")
    with pytest.raises(DataError, match="not the known text"):
        corpus("tinystories")


@pytest.mark.parametrize("name, size", [("shakespeare", 1024), ("stories", 2048)])
def test_packaged_tokenizers_are_lossless_and_small(name, size):
    tokenizer = packaged(name)
    assert len(tokenizer) == size and tokenizer.bos_token_id == 0 and tokenizer.bos_token == END
    texts = ("Good morrow, Kate!\n\n", "  two", "naïve — 猫", "1987\t£ 🙂", corpus("embedded").test[3])
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("2024", add_special_tokens=False).input_ids == [
        tokenizer.convert_tokens_to_ids(digit) for digit in "2024"
    ]


def test_the_packaged_tokenizer_is_made_from_the_training_plays():
    made, kept = train_bpe(corpus("embedded").train, 1024), packaged("shakespeare").backend_tokenizer
    assert json.loads(made.to_str())["model"] == json.loads(kept.to_str())["model"]


def test_documents_are_scored_by_windows_as_one_by_one(tiny):
    documents = ["A short one.", "To be, " * 40, "x"]
    tokenizer = tokenizer_of(tiny)
    nats, counts = document_nats(tiny, tokenizer, documents)
    for document, found, count in zip(documents, nats, counts, strict=True):
        ids = [0, *tokenizer(document).input_ids]
        assert count == len(ids) - 1
        total = 0.0
        for start in range(0, count, 32):  # disjoint windows, each begun by the token before it
            window = torch.tensor([ids[start : start + 33]])
            with torch.no_grad():
                logp = tiny(input_ids=window[:, :-1]).logits.log_softmax(-1)
            total -= float(logp.gather(-1, window[:, 1:, None]).sum())
        assert found == pytest.approx(total, rel=1e-5)
    with pytest.raises(DataError, match="no token to predict"):
        document_nats(tiny, tokenizer, ["fine", ""])


def test_only_the_continuation_is_scored(tiny):
    ids = [0, 5, 9, 300, 17, 4]
    whole, head, tail = sequence_nats(tiny, [Scored(ids), Scored(ids[:4]), Scored(ids, first=4)])
    assert whole == pytest.approx(head + tail, rel=1e-5)


def test_weights_that_are_not_finite_are_refused(tiny):
    broken = llama(1024, 32, 48, layers=1, heads=4, context=32, tokenizer="shakespeare").eval()
    broken.model.norm.weight.data[0] = math.nan
    with pytest.raises(DataError, match="likelihood of nan"):
        document_nats(broken, tokenizer_of(broken), ["Good morrow."])


def test_perplexity_is_the_ratio_of_sums_with_its_delta_method_error():
    texts, nats = ["a b c", "d e", "f g h i j"], [6.0, 5.0, 9.0]
    result = perplexity_result(nats, texts)
    value = math.exp(20 / 10)
    assert result.metrics["word_perplexity"].value == pytest.approx(value)
    residuals = [6 - 2 * 3, 5 - 2 * 2, 9 - 2 * 5]
    error = math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 10
    assert result.metrics["word_perplexity"].stderr == pytest.approx(value * error)
    size = sum(map(len, texts))
    assert result.metrics["bits_per_byte"].value == pytest.approx(20 / math.log(2) / size)
    assert result.n == 3 and perplexity_result(nats, texts[::-1]).sample_set != result.sample_set


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tiny):
    uniform = llama(1024, 32, 48, layers=1, heads=4, context=64, tokenizer="shakespeare").eval()
    uniform.model.norm.weight.data.zero_()
    result = get_task("llm/embedded").evaluate(uniform)
    tokens = len(token_stream(corpus("embedded").test, packaged("shakespeare"))) - result.n
    words = sum(map(data.words, corpus("embedded").test))
    assert result.metrics["word_perplexity"].value == pytest.approx(1024 ** (tokens / words), rel=1e-5)
    counted = get_task("llm/embedded").flops(uniform)
    # 64 tokens: q, k, v, o of 32 x 32, three FFN matrices, the head; attention twice 64 x 64 x 32.
    products = 64 * (4 * 32 * 32 + 3 * 32 * 48 + 32 * 1024) + 2 * 64 * 64 * 32
    assert counted.dense == counted.sparse == 2 * products


def test_cloze_questions_are_fixed_and_fair():
    questions = ClozeEmbedded().questions()
    assert questions == ClozeEmbedded().questions() and len(questions) > 100
    whole = "\0".join(corpus("embedded").test)
    for context, answers in questions:
        assert len(set(answers)) == 4 and context + answers[0] in whole
        assert {len(answer) - len(answer.lstrip()) for answer in answers} == {2}


def test_kneser_ney_by_hand():
    # Bigrams of 0 1 2 1 2: (0 1), (1 2) twice, (2 1). Once 2, twice 1: D = 2 / (2 + 2 * 1) = 0.5.
    model = KneserNey(2, vocabulary=4).fit([[0, 1, 2, 1, 2]])
    # Unigrams count what stands before: 1 after 0 and 2, 2 after 1. Once 1, twice 1: D = 1 / 3.
    one, two = (2 - 1 / 3) / 3 + 2 / 9 / 4, (1 - 1 / 3) / 3 + 2 / 9 / 4
    assert model.probability([], 1) == pytest.approx(one)
    assert model.probability([1], 2) == pytest.approx(1.5 / 2 + 0.5 / 2 * two)
    assert model.probability([1], 3) == pytest.approx(0.5 / 2 * (2 / 9 / 4))
    assert model.probability([3], 1) == pytest.approx(one)  # an unseen history says nothing
    assert model.nats([0, 1]) == pytest.approx(-math.log(0.5 + 0.5 * one))


@pytest.mark.parametrize("order", [1, 3])
def test_kneser_ney_sums_to_one(order):
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(6, (30,), generator=generator).tolist() for _ in range(4)]
    model = KneserNey(order, vocabulary=8).fit(documents)
    for history in ([0, 0], [3, 1], [7, 7], [5, 2]):
        assert sum(model.probability(history, token) for token in range(8)) == pytest.approx(1)
    with pytest.raises(ConfigError, match="at least 1"):
        KneserNey(0, 8)


TASK = """
task: three_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
ROWS = (
    '{"question": "Good my", "choices": ["lord", "xq zz"], "label": 0}\n'
    '{"question": "I am a", "choices": ["zq qq", "man"], "label": 1}\n'
    '{"question": "What say", "choices": ["you", "qx"], "label": 1}\n'
    '{"question": "To the", "choices": ["king", "queen", "lkjd"], "label": 2}\n'
)


@pytest.mark.filterwarnings("default")
def test_lm_eval_tasks_give_lm_evals_own_numbers(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import zoo

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "three.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    model = zoo.load("llm/dense-shakespeare")
    task = get_task(f"lm_eval:{tmp_path / 'three.yaml'}")
    assert (task.primary, task.direction("acc_norm"), task.domain) == ("acc", 1, "llm")
    result = task.evaluate(model)
    assert model.dtype == torch.float16
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    wrapped = HFLM(pretrained=model.float(), tokenizer=tokenizer_of(model), batch_size=1, max_length=256)
    found = lm_eval.simple_evaluate(wrapped, tasks=["three_words"], task_manager=manager)
    own = found["results"]["three_words"]
    for metric in ("acc", "acc_norm"):
        assert result.metrics[metric].value == own[f"{metric},none"]
        assert result.metrics[metric].stderr == pytest.approx(own[f"{metric}_stderr,none"])
        assert sum(result.samples[metric]) / result.n == pytest.approx(own[f"{metric},none"])
    assert result.n == 4 and 0 < result.metrics["acc"].value < 1
    with pytest.raises(UnknownNameError, match="is not there"):
        get_task("lm_eval:absent.yaml")
