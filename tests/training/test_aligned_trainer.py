"""Alignments of text and speech, training with them, another codec for a model, and what is packaged."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, EncodecModel, set_seed

from example_runner import EXAMPLES, run_example
from transformers_sled import SledForSpeechSynthesis, SledProcessor
from transformers_sled.interleaving_sled import get_positions
from transformers_sled.text_sled import encode_text
from transformers_sled.training import (
    AlignedTrainer,
    AlignmentArguments,
    SledDataArguments,
    SledDataCollator,
    SledModelArguments,
    SledTrainingArguments,
    align_text,
    change_codec,
    load_model,
    load_source,
    load_splits,
    parse_recipe,
)
from transformers_sled.training.aligned_trainer import locate
from transformers_sled.training.alignment import align


TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "fixtures" / "golden"


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


def test_phonemes_are_learned_by_a_layer_that_is_not_kept(train, alignments_with_phonemes):
    output = train(alignments=alignments_with_phonemes, max_steps=40)
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [entry["phoneme_loss"] for entry in log if "phoneme_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    model = SledForSpeechSynthesis.from_pretrained(output)
    assert load_file(output / "model.safetensors").keys() == model.state_dict().keys()


def test_labels_of_other_data_are_refused(data, checkpoint):
    labels = datasets.Dataset.from_dict({"id": ["other"], "phonemes": [[0]]})
    codec, tokenizer = EncodecModel.from_pretrained(GOLDEN / "codec"), AutoTokenizer.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="no labels of 8 utterances"):
        align_text(load_source(str(data)), tokenizer, codec, labels, 2)


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


def test_attention_is_what_it_was_where_nothing_is_aligned(checkpoint, batch):
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
    attention = model(**batch, output_attentions=True).attentions[-1]
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
    attention = model(**batch, output_attentions=True).attentions[-1]
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


def test_steps_of_both_layouts_take_turns(train, monkeypatch):
    sizes = []
    forward = SledForSpeechSynthesis.forward

    def record(self, *args, **kwargs):
        if self.training:
            sizes.append((self.config.text_chunk_size, self.config.speech_chunk_size))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SledForSpeechSynthesis, "forward", record)
    output = train(text_chunk_size=2, speech_chunk_size=7, both_layouts=True, max_steps=4)
    assert sizes == [(2, 7), (None, None), (2, 7), (None, None)]
    assert SledForSpeechSynthesis.from_pretrained(output).config.text_chunk_size == 2


def test_the_recipe_for_a_gpu_trains_both_layouts(arguments, tmp_path):
    small = {"max_steps": 2, "dataloader_num_workers": 0, "dataloader_persistent_workers": "false"}
    run_example("tiny_voice/train_aligned.py", EXAMPLES / "tiny_voice" / "gpu.yaml", *arguments(**small))
    model = SledForSpeechSynthesis.from_pretrained(tmp_path / "out")
    assert (model.config.text_chunk_size, model.config.speech_chunk_size) == (8, 18)


def test_a_model_of_both_layouts_is_packaged_in_each_with_its_weights_once(train, tmp_path, capfd):
    model = train(text_chunk_size=2, speech_chunk_size=7, both_layouts=True, max_steps=2)
    offline, interleaved = tmp_path / "voices" / "offline", tmp_path / "voices" / "interleaved"
    weights = offline / "model.safetensors"
    for folder, options, size, threshold, side in (
        (offline, ["--offline"], None, 0.8, "left"),
        (interleaved, ["--weights-of", offline], 2, 0.5, "right"),
    ):
        options += ["--temperature", 0.2, "--normalizer", "en", "--max-part-seconds", 8, "--min-new-tokens", 4]
        run_example("tiny_voice/package_voice.py", "--output-dir", folder, *options, model=model)
        packaged = SledForSpeechSynthesis.from_pretrained(folder)
        assert packaged.config.text_chunk_size == size
        assert packaged.generation_config.eos_threshold == threshold
        assert packaged.generation_config.temperature == 0.2
        assert packaged.generation_config.min_new_tokens == 4
        processor = SledProcessor.from_pretrained(folder)
        assert (processor.normalizer, processor.max_part_seconds) == ("en", 8)
        assert processor.tokenizer.padding_side == side
        stored = load_file(weights)
        assert all(weight.dtype == torch.float16 for weight in stored.values())
        for name, value in packaged.state_dict().items():
            assert torch.equal(value, stored[name].to(value.dtype)), name
    assert list(tmp_path.glob("voices/*/*.safetensors")) == [weights]

    name = next(iter(stored))
    save_file({**stored, name: stored[name] + 1}, weights, metadata={"format": "pt"})
    other = ["--output-dir", tmp_path / "other", "--weights-of", offline]
    with pytest.raises(SystemExit):
        run_example("tiny_voice/package_voice.py", *other, model=model)
    assert "has other weights than the model" in capfd.readouterr().err
    for option, value in (("--max-part-seconds", 0), ("--min-new-tokens", -1), ("--normalizer", "xx")):
        with pytest.raises(SystemExit):
            run_example("tiny_voice/package_voice.py", "--output-dir", tmp_path / "bad", option, value, model=model)
        assert str(value) in capfd.readouterr().err and not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"both_layouts": True}, "--both_layouts needs an interleaved model"),
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
