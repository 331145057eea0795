"""BERT's and T5's samples against megatron-core's own classes and C++ helper, number for number."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmegatron.data import tokenizers
from fmegatron.data.batches import batches
from fmegatron.data.bert import Bert
from fmegatron.data.indexed import IndexedDataset, IndexedWriter
from fmegatron.data.masking import Masking, continuations
from fmegatron.data.sentence_index import sentence_index
from fmegatron.data.t5 import T5, corrupt, noise_spans, restore

helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
VOCAB, CLS, SEP, MASK, BOS, EOS = 120, 1, 2, 3, 4, 5
SENTINELS = range(100, 120)
CONTINUES = np.array([i % 3 == 0 and i > 9 for i in range(VOCAB)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    prefix, draw = tmp_path_factory.mktemp("sentences") / "x", np.random.default_rng(0)
    with IndexedWriter(prefix, "<u2") as out:
        for _ in range(30):
            out.add_document(*(draw.integers(10, 100, draw.integers(1, 12)) for _ in range(draw.integers(0, 9))))
        out.add_document([11] * 600, [12])
    return IndexedDataset(prefix)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.one_of(st.integers(0, 30), st.just(513)), max_size=6), min_size=1, max_size=8),
    st.integers(3, 40), st.integers(1, 2**31 - 2), st.sampled_from([None, 1, 40, 700]), st.sampled_from([0, 0.1, 0.4, 1]),
    st.sampled_from([1, 2]),
)
def test_the_index_is_that_of_the_cpp_helper(sizes, aim, seed, samples, short, least):
    documents = np.cumsum([0, *map(len, sizes)])
    lengths = np.array(sum(sizes, []), np.int32)
    usable = any(len(d) >= least and (len(d) < 2 or max(d) <= 512) for d in sizes)
    if not usable:
        with pytest.raises(ValueError, match="no document has"):
            sentence_index(documents, lengths, aim, seed, samples=samples, short=short, least=least)
        return
    epochs = (1, 2**40) if samples is None else (2**31 - 2, samples)
    theirs = helpers.build_mapping(documents, lengths, *epochs, aim, short, seed, False, least)
    ours = sentence_index(documents, lengths, aim, seed, samples=samples, short=short, least=least)
    assert ours.tolist() == theirs.tolist()


def theirs(cls: type, data: IndexedDataset, index, **config):
    """megatron-core's data set over our file, without its own way of building the index."""
    names = {i: f"{'##' if CONTINUES[i] else ''}{i}" for i in range(VOCAB)}
    tokenizer = SimpleNamespace(
        cls=CLS, sep=SEP, mask=MASK, bos=BOS, eos=EOS, inv_vocab=names, additional_special_tokens_ids=list(SENTINELS)
    )
    made = object.__new__(cls)
    defaults = {"masking_use_longer_ngrams": False, "masking_do_permutation": False, "classification_head": True}
    made.config = SimpleNamespace(tokenizer=tokenizer, **(defaults | config))
    made.dataset, made.sample_index, made._pad_token_id, made.token_lookup = data, index, -1, list(range(VOCAB))
    return made


maskings = st.builds(
    Masking, rate=st.sampled_from([0.15, 0.5]), longest=st.sampled_from([1, 3, 10]), longer=st.booleans(),
    geometric=st.booleans(), continues=st.sampled_from([None, CONTINUES]),
)


def said(masking: Masking, seed: int, seq: int) -> dict:
    return {
        "masking_probability": masking.rate, "masking_max_ngram": masking.longest, "random_seed": seed,
        "masking_use_longer_ngrams": masking.longer, "masking_use_geometric_distribution": masking.geometric,
        "masking_do_full_word": masking.continues is not None, "sequence_length": seq, "sequence_length_encoder": seq,
    }


@given(maskings, st.integers(1, 1000), st.booleans(), st.sampled_from([16, 40]))
def test_bert_rows_are_those_of_megatron(data, masking, seed, pairs, seq):
    from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset

    rows = Bert(data, seq, seed, CLS, SEP, MASK, VOCAB, masking, pairs, samples=60)
    oracle = theirs(
        BERTMaskedWordPieceDataset, data, rows.index, classification_head=pairs, **said(masking, seed, seq)
    )
    for number in range(0, len(rows), 7):
        row, item = rows.row(number), oracle[number]
        text = item["padding_mask"] == 1
        assert (row["documents"] == ~text).all() and (row["types"][text] == item["types"][text]).all()
        assert row["tokens"].tolist() == item["text"].tolist()
        assert row["weights"].tolist() == item["loss_mask"].tolist()
        assert (row["labels"][row["weights"] == 1] == item["labels"][row["weights"] == 1]).all()
        assert int(row["swapped"]) == item["is_random"]


@given(maskings, st.integers(1, 1000), st.sampled_from([32, 64]))
def test_t5_rows_are_those_of_megatron(data, masking, seed, seq):
    from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset

    rows = T5(data, seq, seq, seed, list(range(100, 300)), BOS, EOS, frozenset({CLS, SEP}), masking, samples=60)
    oracle = theirs(T5MaskedWordPieceDataset, data, rows.index, sequence_length_decoder=seq, **said(masking, seed, seq))
    oracle.config.tokenizer.additional_special_tokens_ids = list(rows.sentinels)
    for number in range(0, len(rows), 7):
        row, item = rows.row(number), oracle[number]
        for ours, other in {"tokens": "text_enc", "decoder_tokens": "text_dec", "weights": "loss_mask"}.items():
            assert row[ours].tolist() == np.maximum(item[other], 0).tolist()
        assert (row["documents"] == 1 - item["enc_mask"]).all() and (row["decoder_documents"] == 1 - item["dec_mask"]).all()
        learned = row["weights"] == 1
        assert (row["labels"][learned] == item["labels"][learned]).all()


@given(st.integers(2, 300), st.floats(0.05, 0.6), st.floats(1, 6), st.integers(0, 9))
def test_noise_spans_have_their_rate_and_mean_and_what_is_taken_out_comes_back(length, rate, mean, seed):
    spans = noise_spans(length, rate, mean, np.random.RandomState(seed))
    taken = [at for span in spans for at in span]
    assert taken == sorted(set(taken)) and all(span == list(range(span[0], span[-1] + 1)) for span in spans)
    assert len(taken) == min(max(round(length * rate), 1), length - 1)
    assert len(spans) == min(max(round(len(taken) / mean), 1), len(taken), length - len(taken))
    assert spans[0][0] > 0 and all(b[0] > a[-1] + 1 for a, b in zip(spans, spans[1:], strict=False))
    text, marks = list(range(length)), range(1000, 1000 + len(spans))
    encoder, decoder = corrupt(text, spans, marks)
    assert restore(encoder, decoder, marks) == text and len(encoder) + len(decoder) == length + 2 * len(spans)


def test_rows_do_not_depend_on_when_or_where_they_are_made_and_come_again_masked_anew(data):
    bert = Bert(data, 32, 7, CLS, SEP, MASK, VOCAB)
    t5 = T5(data, 32, 32, 7, list(SENTINELS), BOS, EOS, mean_span=3.0)
    for rows in (bert, t5):
        count = len(rows)
        whole = batches(rows, 4, count - 6, ahead=0)
        parts = [batches(rows, 4, count - 6, rows=[2 * r, 2 * r + 1], workers=2) for r in range(2)]
        for _ in range(3):
            batch, (low, high) = next(whole), [next(part) for part in parts]
            for key, value in batch.items():
                assert value.tolist() == low[key].tolist() + high[key].tolist()
        pairs = [(rows.row(n), rows.row(n + count)) for n in range(8)]
        assert sum((first["tokens"] != again["tokens"]).any() for first, again in pairs) > 4
        for part in parts:
            part.close()


def test_what_does_not_fit_is_said(data):
    few = T5(data, 64, 64, 1, [100], BOS, EOS, masking=Masking(rate=0.5))
    with pytest.raises(ValueError, match="spans and 1 sentinels"):
        [few.row(i) for i in range(len(few))]
    tight = T5(data, 64, 4, 1, list(SENTINELS), BOS, EOS, masking=Masking(rate=0.5), mean_span=3.0)
    with pytest.raises(ValueError, match=r"sample \d+: .* for a decoder of 4: raise"):
        [tight.row(i) for i in range(len(tight))]
    with pytest.raises(ValueError, match="masking rate 1.5"):
        Masking(rate=1.5)
    with pytest.raises(ValueError, match="Bytes does not tell words apart"):
        continuations(tokenizers.Bytes())


def test_words_of_a_byte_level_tokenizer(tmp_path: Path):
    codec = tokenizers.train_bpe(["unbelievable believer, believe it"] * 9, 280)
    continues = continuations(codec)
    ids = codec.encode("believe unbelievable, it")
    words = Masking(continues=continues)._words(ids, set())
    texts = [codec.decode([ids[at] for at in word]) for word in words]
    assert texts[0] == "believe" and "".join(texts) == "believe unbelievable, it"
    assert " unbelievable" in texts
