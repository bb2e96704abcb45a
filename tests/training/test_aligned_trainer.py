"""The small voice's own training: pairs of utterances, alignments of text and speech, and training with them."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, EncodecFeatureExtractor, EncodecModel, set_seed

from example_runner import EXAMPLES, run_example
from transformers_sled import SledForSpeechSynthesis, SledProcessor
from transformers_sled.interleaving_sled import get_positions
from transformers_sled.text_sled import encode_text
from transformers_sled.training import (
    AlignedTrainer,
    AlignmentArguments,
    PreparationArguments,
    SledDataArguments,
    SledDataCollator,
    SledModelArguments,
    SledTrainingArguments,
    align_text,
    change_codec,
    join_utterances,
    load_model,
    load_source,
    load_splits,
    parse_recipe,
    prepare_dataset,
)
from transformers_sled.training.aligned_trainer import locate
from transformers_sled.training.alignment import align


TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "fixtures" / "golden"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Codes of 8 utterances of 40 to 54 frames by two speakers."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = [
        {
            "id": f"u+{index}",
            "text": ["Stop.", "Two plus two."][index % 2],
            "speaker": "abba"[index % 4],
            "audio": {"array": 0.1 * rng.standard_normal(320 * (40 + 2 * index)), "sampling_rate": 24000},
        }
        for index in range(8)
    ]
    codec = EncodecModel.from_pretrained(GOLDEN / "codec").eval()
    prepare_dataset(datasets.Dataset.from_list(rows), codec, PreparationArguments(str(folder), min_duration=0.0))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The golden offline model with its codec, without dropout."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=GOLDEN / "codec")
    for name in ("dropout", "activation_dropout", "attention_dropout", "text_dropout_prob"):
        setattr(model.config, name, 0.0)
    model.config.latent_noise_std = 0.25
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "offline")
    SledProcessor(EncodecFeatureExtractor.from_pretrained(GOLDEN / "codec"), tokenizer).save_pretrained(folder)
    return folder


def align_data(data, checkpoint, labels=None):
    codec = EncodecModel.from_pretrained(GOLDEN / "codec")
    return align_text(load_source(str(data)), AutoTokenizer.from_pretrained(checkpoint), codec, labels, 2)


@pytest.fixture(scope="module")
def alignments(data, checkpoint, tmp_path_factory):
    """The file that align_text.py writes for the data."""
    output = tmp_path_factory.mktemp("alignments") / "alignments.parquet"
    settings = {"dataset": data, "tokenizer": checkpoint, "codec": GOLDEN / "codec", "output": output}
    run_example("tiny_voice/align_text.py", iterations=2, **settings)
    return output


@pytest.fixture(scope="module")
def alignments_with_phonemes(data, checkpoint, tmp_path_factory):
    """The same with phonemes, 60 labels a second, which change every quarter of a second."""
    output = tmp_path_factory.mktemp("phonemes") / "alignments.parquet"
    features = datasets.Features(
        id=datasets.Value("string"), phonemes=datasets.Sequence(datasets.ClassLabel(names=["sil", "a", "b"]))
    )
    rows = [{"id": f"u+{index}", "phonemes": [(time // 15) % 3 for time in range(60)]} for index in range(8)]
    align_data(data, checkpoint, datasets.Dataset.from_list(rows, features=features)).to_parquet(output)
    return output


@pytest.fixture
def arguments(data, checkpoint, alignments, tmp_path):
    def build(**changes):
        values = {
            "alignments": alignments,
            "aligned_layers": "1",
            "aligned_heads": "3",
            "dataset_name": data,
            "model_name_or_path": checkpoint,
            "output_dir": tmp_path / "out",
            "max_steps": 30,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 5,
            "save_strategy": "no",
            "report_to": "none",
            **changes,
        }
        words = [
            str(word)
            for name, value in values.items()
            for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
        ]
        return [*words, "--do_train", "--use_cpu", "--disable_tqdm", "true"]

    return build


@pytest.fixture
def train(arguments, tmp_path):
    """Does what the example does in this process and returns its folder."""

    def run(**changes):
        types = [AlignmentArguments, SledModelArguments, SledDataArguments, SledTrainingArguments]
        alignment_args, model_args, data_args, args = parse_recipe(types, arguments(**changes))
        set_seed(args.seed)
        model, processor = load_model(model_args)
        trainer = AlignedTrainer(
            model,
            args,
            train_dataset=load_splits(data_args, args, model, processor)[0],
            processing_class=processor,
            alignment_args=alignment_args,
        )
        trainer.run()
        return tmp_path / "out"

    return run


def read_alignments(path):
    table = datasets.Dataset.from_parquet(str(path))
    return dict(zip(table["id"][:], table["alignment"][:], strict=True))


@pytest.fixture
def join(data, tmp_path):
    def run(folder=data, output_dir=tmp_path / "joined", num_pairs=5, **changes):
        if "alignments" in changes:
            changes["alignments"] = load_source(str(changes["alignments"]))
            changes["tokenizer"] = AutoTokenizer.from_pretrained(GOLDEN / "offline")
        join_utterances(folder, output_dir, num_pairs=num_pairs, **changes)
        return output_dir

    return run


def test_pairs_are_one_speaker_saying_one_after_the_other(data, join):
    rows = {row["id"]: row for row in load_source(str(data))}
    joined = list(load_source(str(join())))
    assert joined[:8] == list(rows.values())
    assert len({row["id"] for row in joined}) == len(joined) == 8 + 5
    for row in joined[8:]:
        first, second = (rows[name] for name in (row["id"][:3], row["id"][4:]))
        assert first["id"] != second["id"]
        assert row["speaker"] == first["speaker"] == second["speaker"]
        assert row["text"] == f"{first['text']} {second['text']}"
        assert row["length"] == first["length"] + second["length"]
        assert np.array_equal(
            row["audio_codes"], np.concatenate([first["audio_codes"], second["audio_codes"]], axis=1)
        )


def test_pairs_are_not_longer_than_asked_for(join):
    joined = load_source(str(join(num_pairs=100, max_frames=94)))
    assert len(joined) > 8 and max(joined["length"][:]) <= 94


def test_pairs_have_alignments_and_are_trained_on(data, arguments, alignments, checkpoint, tmp_path, capsys):
    folder = tmp_path / "joined"
    words = ["--dataset", data, "--output-dir", folder, "--num-pairs", 5]
    run_example("tiny_voice/join_utterances.py", *words, alignments=alignments, tokenizer=checkpoint)
    assert capsys.readouterr().out.strip() == f"{folder}: 8 utterances and 5 pairs"
    paths = read_alignments(folder / "alignments.parquet")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = {row["id"]: row for row in load_source(str(folder))}
    assert paths.keys() == rows.keys() and len(rows) == 8 + 5
    for name in list(rows)[8:]:
        first, second = name[:3], name[4:]
        assert len(paths[name]) == rows[name]["length"]
        assert paths[name][: len(paths[first])] == paths[first]
        tokens, parts = encode_text(tokenizer, rows[name]["text"]), encode_text(tokenizer, rows[second]["text"])
        # What is spoken in the last frames is counted from the end of the text.
        assert [len(tokens) - index for index in paths[name][-len(paths[second]) :]] == [
            len(parts) - index for index in paths[second]
        ]
    changes = {"dataset_name": folder, "alignments": folder / "alignments.parquet", "max_steps": 4}
    run_example("tiny_voice/train_aligned.py", *arguments(**changes))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_phonemes_go_with_the_alignments(data, alignments, alignments_with_phonemes, join):
    assert read_alignments(alignments_with_phonemes) == read_alignments(alignments)
    folder = join(alignments=alignments_with_phonemes)
    table = datasets.Dataset.from_parquet(str(folder / "alignments.parquet"))
    assert table.features["phonemes"].feature.names == ["sil", "a", "b"]
    phonemes = dict(zip(table["id"][:], table["phonemes"][:], strict=True))
    lengths = {row["id"]: row["length"] for row in load_source(str(folder))}
    assert {name: len(row) for name, row in phonemes.items()} == lengths
    # 75 frames a second: the middle of the 19th is nearer to the label of the first quarter of a second than to another.
    assert phonemes["u+0"][:19] == 18 * [0] + [1]
    for name in list(phonemes)[8:]:
        assert phonemes[name] == phonemes[name[:3]] + phonemes[name[4:]]


def test_phonemes_are_learned_by_a_layer_that_is_not_kept(train, alignments_with_phonemes):
    output = train(alignments=alignments_with_phonemes, max_steps=40)
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [entry["phoneme_loss"] for entry in log if "phoneme_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    model = SledForSpeechSynthesis.from_pretrained(output)
    assert load_file(output / "model.safetensors").keys() == model.state_dict().keys()


def test_labels_of_other_data_are_refused(data, checkpoint):
    with pytest.raises(ValueError, match="no labels of 8 utterances"):
        align_data(data, checkpoint, datasets.Dataset.from_dict({"id": ["other"], "phonemes": [[0]]}))


def test_a_changed_codec_with_turned_latents_changes_nothing(checkpoint):
    """Latents that are turned and shifted hold the same: losses, and so what the model says, must stay what they are."""
    model = SledForSpeechSynthesis.from_pretrained(checkpoint).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    audio = [0.1 * torch.randn(24_000, generator=generator) for _ in range(10)]
    codec = EncodecModel.from_pretrained(GOLDEN / "codec").eval()
    turn, _ = torch.linalg.qr(torch.randn(codec.config.hidden_size, codec.config.hidden_size, generator=generator))
    last = codec.encoder.layers[-1].conv
    with torch.no_grad():
        weight, bias = last.weight.clone(), last.bias.clone()
        last.weight = torch.einsum("oi,idk->odk", turn, weight).contiguous()
        last.bias.copy_(turn @ bias + 0.5)
    with torch.no_grad():
        old_latents = model.codec.encoder(audio[0][None, None]).transpose(1, 2)[:, :7]
    noise = torch.randn(1, 7, model.config.noise_dim, generator=generator)
    hidden_states = torch.randn(1, 7, model.config.hidden_size, generator=generator)
    with torch.no_grad():
        read, written = model.embed_latents(old_latents), model.generative_head(hidden_states, noise)
        explained = change_codec(model, codec, audio)
        new_latents = old_latents @ turn.T + 0.5
        torch.testing.assert_close(model.embed_latents(new_latents), read, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(
            model.generative_head(hidden_states, noise), written @ turn.T + 0.5, atol=1e-3, rtol=1e-3
        )
    assert min(explained) > 0.99
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if not name.startswith("codec.")} == {
        "z_proj.weight", "z_proj.bias",
        "generative_head.final_layer.linear.weight", "generative_head.final_layer.linear.bias",
    }  # fmt: skip


def test_a_codec_of_another_frame_rate_is_refused(checkpoint):
    model = SledForSpeechSynthesis.from_pretrained(checkpoint)
    codec = EncodecModel.from_pretrained(EXAMPLES / "tiny_voice" / "codec")
    with pytest.raises(ValueError, match="`hop_length` is 320 in the old codec and 800 in the new"):
        change_codec(model, codec, [])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_frames": 50}, "has two utterances of 50 frames together"),
        ({"folder": GOLDEN}, "was not written by prepare_data.py"),
        ({"output_dir": GOLDEN}, "is already there"),
        ({"tokenizer": "given"}, "`alignments` and `tokenizer` need each other"),
    ],
)
def test_pairs_that_cannot_be_made_are_refused(join, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        join(**changed)
    assert not (tmp_path / "joined").exists()


def test_alignment_finds_what_was_said():
    generator = torch.Generator().manual_seed(0)
    means = 4 * torch.randn(12, 6, generator=generator)
    features, states, truth = [], [], []
    for _ in range(60):
        row = torch.randint(12, (8,), generator=generator)
        # A word repeated is one long word to any aligner.
        row = torch.unique_consecutive(row)
        durations = torch.randint(2, 7, (len(row),), generator=generator)
        path = torch.arange(len(row)).repeat_interleave(durations)
        features.append(means[row[path]] + torch.randn(len(path), 6, generator=generator))
        states.append(row)
        truth.append(path)
    found = align(features, states, 12, num_iterations=10)
    assert [len(path) for path in found] == [len(path) for path in truth]
    assert (torch.cat(found) == torch.cat(truth)).float().mean() > 0.95


def test_alignments_visit_every_token_in_order(data, checkpoint, alignments):
    rows = load_source(str(data))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = load_source(str(alignments))
    assert found["id"][:] == rows["id"][:]
    for row, alignment in zip(rows, found["alignment"][:], strict=True):
        assert len(alignment) == row["length"]
        assert sorted(set(alignment)) == list(range(len(encode_text(tokenizer, row["text"]))))
        assert alignment == sorted(alignment)


@pytest.fixture
def batch(data, checkpoint):
    rows = load_source(str(data))
    return SledDataCollator(SledProcessor.from_pretrained(checkpoint))([rows[0], rows[3]])


def test_attention_is_eager_where_nothing_is_aligned(checkpoint, batch):
    losses = []
    for implementation in ("eager", "aligned"):
        model = SledForSpeechSynthesis.from_pretrained(checkpoint, attn_implementation=implementation).eval()
        torch.manual_seed(0)
        losses.append(model(**batch).loss)
    torch.testing.assert_close(*losses)


def test_frames_are_predicted_from_the_token_they_are_forced_to(checkpoint, batch):
    model = SledForSpeechSynthesis.from_pretrained(checkpoint, attn_implementation="aligned").train()
    text_mask, frame_mask = batch["attention_mask"].bool(), batch["audio_codes_mask"].bool()
    num_tokens, num_frames = text_mask.sum(dim=1), frame_mask.sum(dim=1)
    alignment = torch.arange(batch["audio_codes_mask"].shape[1]) * num_tokens[:, None] // num_frames[:, None]
    alignment = alignment.masked_fill(~frame_mask, -1)
    target = locate(model, alignment, text_mask, frame_mask, num_heads=3, forced_share=1.0)
    model.model.layers[1].self_attn.alignment = target
    # The second row without its text but for the last token.
    model._drop_text = lambda ids, mask, count: (
        mask & torch.tensor([[True], [False]]) | (torch.arange(ids.shape[1]) == count[:, None] - 1),
        ids,
        torch.tensor([False, True]),
    )
    attention = model(**batch, output_attentions=True).attentions[1]
    for frame in range(int(num_frames[0])):
        token = int(alignment[0, frame])
        query = int(num_tokens[0]) - 1 + frame
        for head in range(3):
            assert attention[0, head, query, min(token + head, int(num_tokens[0]) - 1)] == 1
        assert attention[0, 3, query].max() < 1
    assert not target.is_visible[1, :, : int(num_tokens[1]) + 5].any()
    # Later heads of that row do not take the one token left for the next.
    assert (target.is_visible[1] == target.is_visible[1, :1]).all() and target.is_visible[1].any()
    assert target.is_visible[0].sum(dim=-1).tolist() == 3 * [num_frames[0]]


def test_pairs_without_alignments_of_their_parts_are_refused(join, tmp_path):
    datasets.Dataset.from_dict({"id": ["other"], "alignment": [[0]]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="has no utterances of the pairs"):
        join(alignments=tmp_path / "other.parquet")
    assert not (tmp_path / "joined").exists()


def test_interleaved_text_is_looked_at_once_it_is_read(checkpoint, batch):
    model = SledForSpeechSynthesis.from_pretrained(checkpoint, attn_implementation="aligned").train()
    model.config.text_chunk_size, model.config.speech_chunk_size = 2, 7
    text_mask, frame_mask = batch["attention_mask"].bool(), batch["audio_codes_mask"].bool()
    num_tokens, num_frames = text_mask.sum(dim=1), frame_mask.sum(dim=1)
    # All tokens in the first quarter of the speech, too early for some to have been read; nothing is known of the second row.
    index = torch.arange(frame_mask.shape[1])
    alignment = torch.minimum(4 * index * num_tokens[0] // num_frames[0], num_tokens[0] - 1)
    alignment = torch.stack([alignment.masked_fill(~frame_mask[0], -1), torch.full_like(alignment, -1)])
    target = locate(model, alignment, text_mask, frame_mask, num_heads=3, forced_share=1.0)
    model.model.layers[1].self_attn.alignment = target
    attention = model(**batch, output_attentions=True).attentions[1]
    text_positions, frame_positions = get_positions(
        model.config, num_tokens, num_frames, text_mask.shape[1], frame_mask.shape[1]
    )
    read = []
    for frame in range(int(num_frames[0])):
        token, query = int(alignment[0, frame]), int(frame_positions[0, frame]) - 1
        keys = [int(text_positions[0, min(token + head, int(num_tokens[0]) - 1)]) for head in range(3)]
        read.append([key <= query for key in keys])
        assert target.is_visible[0, :, query].tolist() == read[-1]
        for head in range(3):
            if read[-1][head]:
                assert attention[0, head, query, keys[head]] == 1
    assert {tuple(heads) for heads in read} >= {(True, True, True), (True, True, False), (False, False, False)}
    assert not target.is_visible[1].any()


def test_heads_learn_the_alignment(train):
    output = train(forced_share=0.5, alignment_steps=20, alignment_weight=1.0)
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [entry["attention_loss"] for entry in log if "attention_loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    model = SledForSpeechSynthesis.from_pretrained(output)
    assert model.config.latent_noise_std == 0.25
    assert load_file(output / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aligned_layers": "7"}, "--aligned_layers must be below"),
        ({"aligned_heads": "5"}, "--aligned_heads needs a number from 1 to 4"),
        ({"aligned_heads": "0"}, "--aligned_heads needs a number from 1 to 4"),
        ({"aligned_layers": ["0", "1"]}, r"for each of the layers \[0, 1\], got \[3\]"),
    ],
)
def test_what_cannot_be_aligned_is_refused(train, changes, message):
    with pytest.raises(ValueError, match=message):
        train(**changes)


def test_alignments_of_other_data_are_refused(train, tmp_path):
    datasets.Dataset.from_dict({"id": ["other"], "alignment": [[0]]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="has no utterance of the training data"):
        train(alignments=tmp_path / "other.parquet")


def test_alignments_by_another_tokenizer_are_refused(train, alignments, tmp_path):
    rows = load_source(str(alignments)).to_dict()
    rows["alignment"] = [[min(token, 1) for token in alignment] for alignment in rows["alignment"]]
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="of other codes or another tokenizer"):
        train(alignments=tmp_path / "other.parquet")
