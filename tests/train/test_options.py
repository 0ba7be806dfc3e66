"""Options and inputs of the Trainer: each has its effect here, or is refused with a reason."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from small import SMALL_TEXTS, collate, encode, make_config, make_model, make_teacher, make_trainer, run_one_step
from transformers import TrainingArguments

from xtoken.train import EncodedDataset, ExampleEncoder, TeacherModel, XTokenCollator, XTokenConfig, XTokenTrainer
from xtoken.train.assemble import OF_BUILT
from xtoken.train.config import LEFT, REFUSED
from xtoken.train.data import EncodedStream, lengths

pytestmark = pytest.mark.slow

NAMES = {one.name for one in dataclasses.fields(TrainingArguments)}
ROWS = [{"text": text} for text in SMALL_TEXTS]


@pytest.fixture(scope="module")
def examples(student_tok, teacher_tok) -> Any:
    return encode(SMALL_TEXTS, student_tok, teacher_tok)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("label_smoothing_factor", 0.3),
        ("label_names", ["labels", "others"]),
        ("average_tokens_across_devices", False),
        ("past_index", 0),
        ("remove_unused_columns", True),
    ],
)
def test_options_without_an_effect_are_refused(tmp_path, option, value):
    assert option in REFUSED
    default = {one.name: one.default for one in dataclasses.fields(TrainingArguments)}.get(option)
    if option not in NAMES or (default == value and option == "average_tokens_across_devices"):
        pytest.skip("not an option of this version")
    with pytest.raises(ValueError, match=f"{option}: expected .*since"):
        XTokenConfig(output_dir=str(tmp_path), **{option: value})


def test_options_of_generation(tmp_path):
    """Are refused by name where nothing is generated, where they do nothing, and where they are no number."""
    unused: dict[str, Any] = {"max_new_tokens": 8, "num_generations": 2, "generation_temperature": 0.5}
    unused |= {"generation_top_p": 0.5, "sync_every": 2, "generation_url": "http://127.0.0.1:1"}
    for name, value in unused.items():
        with pytest.raises(ValueError, match=f"{name}: expected on_policy with it"):
            make_config(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=r"num_generations: expected 1 for generation_temperature=0, .*, got 2"):
        make_config(tmp_path, on_policy=1.0, num_generations=2, generation_temperature=0.0)
    for name, value, message in (
        ("max_new_tokens", 2.5, "expected an int, got 2.5"),
        ("max_new_tokens", None, "expected an int, got None"),
        ("num_generations", True, "expected an int, got True"),
        ("generation_temperature", None, "expected a number >= 0, got None"),
        ("generation_top_p", None, "expected a share above 0, at most 1, got None"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            make_config(tmp_path, on_policy=1.0, **{name: value})


def test_what_rows_and_chunks_cannot_go_through(tmp_path, student_tok, teacher_tok):
    with pytest.raises(ValueError, match="dispatch_batches: expected False, since chunks cannot be sent"):
        make_config(tmp_path, accelerator_config={"dispatch_batches": True})
    with pytest.raises(ValueError, match="compute_loss_func: expected None, since the loss is that of args"):
        XTokenTrainer(make_model(700, 0), make_config(tmp_path), compute_loss_func=lambda *_, **__: 0)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_grouping_by_length(tmp_path, student_tok, teacher_tok, examples, strategy):
    """Of data sets whose items have no input_ids; the longest example is in the first batch. A run that goes on in an
    epoch finds its order again."""
    option: dict[str, Any] = {"train_sampling_strategy": strategy}
    if "train_sampling_strategy" not in NAMES:
        option = {"group_by_length": True}
    trainer = make_trainer(
        tmp_path, student_tok, [make_teacher(student_tok, teacher_tok)], examples, examples, **option
    )
    assert lengths(examples) == [len(one["student_ids"]) for one in examples]
    first, *_ = trainer.get_train_dataloader()
    assert first["input_ids"].shape[1] == max(lengths(examples)) or strategy == "batch_rebalance"
    assert len(list(trainer.get_train_dataloader())) == len(list(trainer.get_eval_dataloader())) == len(examples) // 4

    def order(epoch: float) -> list[Any]:
        trainer.state.epoch = epoch
        return [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]

    assert order(1.0) == order(1.5)
    assert order(1.0) != order(0.0) or strategy == "batch_rebalance"
    trainer.train()


def test_options_that_the_trainer_passes_over(tmp_path, student_tok, teacher_tok):
    """What it would leave out without a word: an order of a stream's rows, and half precision on the CPU."""
    option: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" not in NAMES:
        option = {"group_by_length": True}
    for options, rows, message in (
        (option, iter(ROWS), "train_sampling_strategy: expected 'random' or 'sequential' for a stream"),
        ({"fp16": True}, ROWS, "fp16: expected False on the CPU"),
        ({"projection_learning_rate": 0.5}, ROWS, "projection_learning_rate: expected learn_projection with it"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, student_tok, [make_teacher(student_tok, teacher_tok)], rows, **options)


def experts(coefficient: float, size: int) -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=coefficient,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def test_the_loss_of_routers(tmp_path, student_tok, teacher_tok, examples):
    """It is the model's own, a mean over micro-batches, not part of an evaluation."""
    found = {}
    for coefficient, accumulated in ((0.0, 1), (2.0, 1), (2.0, 2)):
        args = make_config(
            tmp_path, max_steps=1, gradient_accumulation_steps=accumulated,
            per_device_train_batch_size=4 // accumulated, train_sampling_strategy="sequential",
        )  # fmt: skip
        model = experts(coefficient, len(student_tok))
        trainer = XTokenTrainer(
            model, args, [make_teacher(student_tok, teacher_tok)], collate, examples[:4], examples[:4], student_tok
        )
        before = trainer.evaluate()["eval_loss"]
        wanted = [
            float(coefficient * model(**{k: one[k] for k in ("input_ids", "attention_mask")}).aux_loss.detach())
            for one in (collate(part) for part in np.split(np.array(examples[:4], object), accumulated))
        ]
        trainer.train()
        found[coefficient, accumulated] = logged(trainer, "loss")[0], before
        assert logged(trainer, "router_loss")[0] == pytest.approx(np.mean(wanted), rel=1e-3)
    plain = found[0.0, 1]
    for key, (loss, before) in found.items():
        assert before == plain[1]
        assert loss - plain[0] == pytest.approx(0.0 if key[0] == 0 else 4.0, rel=0.1, abs=1e-3)  # about 1 a layer
    nameless = experts(1.0, len(student_tok))
    nameless.router_aux_loss_coef = nameless.config.__dict__["router_aux_loss_coef"] = None
    trainer.model = nameless.train()
    with pytest.raises(ValueError, match="student: returns a loss of its routers, but its configuration has none of"):
        trainer.compute_loss(nameless, collate(examples[:2]))


@pytest.fixture(scope="module")
def trained(student_tok, teacher_tok, examples) -> Callable[..., torch.Tensor]:
    """The student's weights after a training with some options; without any it is done once."""
    known: list[torch.Tensor] = []

    def train(folder: Path, **options: Any) -> torch.Tensor:
        if not options and known:
            return known[0]
        trainer = make_trainer(folder, student_tok, [make_teacher(student_tok, teacher_tok)], examples, **options)
        trainer.train()
        found = torch.cat([one.detach().flatten() for one in trainer.model.parameters()])
        known.extend([] if options else [found])
        return found

    return train


@pytest.mark.parametrize(
    "options",
    [{"neftune_noise_alpha": 5.0}, {"weight_decay": 0.5}, {"max_grad_norm": 1e-3}, {"warmup_steps": 3},
     {"optim": "sgd"}, {"data_seed": 7}],
    ids=str,
)  # fmt: skip
def test_options_that_change_the_training(tmp_path, trained, options):
    assert not torch.equal(trained(tmp_path, **options), trained(tmp_path))


@pytest.fixture(scope="module")
def plain_step(tmp_path_factory, student_tok, teacher_tok, examples) -> dict[str, torch.Tensor]:
    teachers = [make_teacher(student_tok, teacher_tok)]
    return run_one_step(tmp_path_factory.mktemp("plain"), student_tok, teachers, examples)


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"dataloader_num_workers": 2}, {"torch_empty_cache_steps": 1},
     {"torch_compile": True, "torch_compile_backend": "eager"}, {"auto_find_batch_size": True},
     {"accelerator_config": {"split_batches": True}}, {"include_num_input_tokens_seen": "non_padding"}],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_change_a_step(tmp_path, student_tok, teacher_tok, examples, options, plain_step, threads):
    teachers = [make_teacher(student_tok, teacher_tok)]
    found = run_one_step(tmp_path, student_tok, teachers, examples, **options)
    want, got = plain_step, {name.replace("_orig_mod.", ""): value for name, value in found.items()}
    assert want.keys() == got.keys()
    for name, value in want.items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-6), name


def test_a_trainer_is_what_its_own_arguments_say(tmp_path, student_tok, monkeypatch):
    """Precision and compiler, which transformers 4 sets for the process; what a launcher has set holds for all."""

    def found(args: XTokenConfig) -> tuple[str, str]:
        state = XTokenTrainer(make_model(len(student_tok), 0), args, [], collate).accelerator.state
        return state.mixed_precision, state.dynamo_plugin.backend.value

    for name in LEFT:
        monkeypatch.delenv(name, raising=False)
    other = {"bf16": True, "torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default"}
    assert found(make_config(tmp_path, **other)) == ("bf16", "EAGER")
    assert found(make_config(tmp_path)) == ("no", "NO")
    first, _ = make_config(tmp_path, **other), make_config(tmp_path)
    assert found(first) == ("bf16", "EAGER")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert found(make_config(tmp_path)) == ("bf16", "EAGER")


def test_a_step_keeps_no_cache(tmp_path, student_tok, teacher_tok, examples):
    """With one RecurrentGemma of transformers 4 has other gradients."""
    trainer = make_trainer(tmp_path, student_tok, [make_teacher(student_tok, teacher_tok)], None)
    batch = trainer._prepare_inputs(collate(examples[:2]))
    for is_training in (True, False):
        trainer.model.train(is_training)
        _, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        assert outputs.past_key_values is None


def test_tokens_seen(tmp_path, student_tok, teacher_tok, examples):
    trainer = make_trainer(
        tmp_path, student_tok, [make_teacher(student_tok, teacher_tok)], examples[:4], max_steps=1,
        include_num_input_tokens_seen="non_padding",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(lengths(examples[:4]))


@pytest.mark.parametrize("in_parts", [False, True])
def test_metrics_and_predictions(tmp_path, student_tok, teacher_tok, examples, in_parts):
    """`compute_metrics` sees logits, labels, inputs and losses of all held-out examples; `predict` too."""
    seen: list[tuple[int, ...]] = []

    def metrics(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        hits = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100]
        assert in_parts or len(prediction.inputs) == len(labels) == len(prediction.losses)
        seen.append(logits.shape)
        return {"accuracy": float(hits.mean() if isinstance(hits, np.ndarray) else hits.float().mean())}

    args = make_config(tmp_path, batch_eval_metrics=in_parts, include_for_metrics=["inputs", "loss"])
    trainer = XTokenTrainer(
        make_model(len(student_tok), 0), args, [make_teacher(student_tok, teacher_tok)], collate, examples[:8],
        {"one": examples[:6], "two": examples[6:8]}, student_tok, compute_metrics=metrics,
    )  # fmt: skip
    measured = trainer.evaluate()
    assert {"eval_one_accuracy", "eval_two_accuracy", "eval_one_ce", "eval_two_kd"} <= measured.keys()
    assert seen[0][0] == (4 if in_parts else 6)
    predicted = trainer.predict(examples[:6])
    assert predicted.predictions.shape[:1] == (6,)
    assert {"test_ce", "test_kd", "test_loss", "test_accuracy"} <= predicted.metrics.keys()
    assert predicted.metrics["test_ce"] == pytest.approx(measured["eval_one_ce"])


def test_a_model_by_name_or_by_a_function(tmp_path, folders, student_tok):
    """The student and a teacher by their folders, whose tokenizers are found, and a collator of them."""
    teacher = TeacherModel(make_teacher(student_tok, None).objective, folders["twin"], name="T")
    assert teacher.vocabulary is not None
    args = make_config(tmp_path, max_steps=1, per_device_train_batch_size=8)
    trainer = XTokenTrainer(folders["student"], args, [teacher], train_dataset=ROWS[:8])
    trainer.train()
    assert len(trainer.processing_class) == len(student_tok)
    assert isinstance(trainer.data_collator, XTokenCollator)
    by_function = XTokenTrainer(
        None, args, [teacher], train_dataset=ROWS[:8], processing_class=student_tok,
        model_init=lambda: make_model(len(student_tok), 0),
    )  # fmt: skip
    by_function.train()
    assert logged(by_function, "kd") == pytest.approx(logged(trainer, "kd"), rel=1e-3)
    with pytest.raises(OSError, match="no/such-model"):
        XTokenTrainer("no/such-model", make_config(tmp_path), [teacher])
    with pytest.raises(ValueError, match="data_collator: expected one, or processing_class and a tokenizer of each"):
        XTokenTrainer(make_model(700, 0), make_config(tmp_path), [teacher])


class Source:
    """A stream without an end, which says how much of it was read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        for row in itertools.cycle(ROWS):
            self.read += 1
            yield row


def raw_trainer(folder: Any, student_tok: Any, teacher_tok: Any, data: Any, **options: Any) -> XTokenTrainer:
    return XTokenTrainer(
        make_model(len(student_tok), 0), make_config(folder, **options), [make_teacher(student_tok, teacher_tok)],
        XTokenCollator(student_tok, [teacher_tok]), data, ROWS[:4], student_tok,
    )  # fmt: skip


def test_rows_that_are_not_encoded(tmp_path, student_tok, teacher_tok):
    """They become what the encoder makes of them; where it cannot be made the error says what is missing."""
    encoder = ExampleEncoder(student_tok, [teacher_tok])
    losses = []
    for data in (ROWS, EncodedDataset(ROWS, encoder), [one for some in encoder.encode(ROWS) for one in some]):
        trainer = raw_trainer(tmp_path, student_tok, teacher_tok, data)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1] == losses[2]
    assert trainer.evaluate()["eval_ce"] == trainer.evaluate(ROWS[:4])["eval_ce"]
    assert trainer.predict(ROWS[:4]).metrics["test_ce"] == trainer.evaluate()["eval_ce"]
    with pytest.raises(ValueError, match=r"row 0: expected messages, conv.*text in 'text' \(text_column\), got a: int"):
        raw_trainer(tmp_path, student_tok, teacher_tok, [{"a": 1}] * 8)
    with pytest.raises(
        ValueError, match=r"train_dataset: expected examples, .* got a row with \['text'\]; with process"
    ):
        XTokenTrainer(
            make_model(len(student_tok), 0), make_config(tmp_path), [make_teacher(student_tok, teacher_tok)],
            XTokenCollator(student_tok, [teacher_tok]), ROWS,
        )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"examples: expected what ExampleEncoder makes of a row .*got \['text'\] witho"
    ):
        XTokenCollator(student_tok, [teacher_tok])(ROWS[:2])


def test_long_rows_are_cut_at_the_models_positions(tmp_path, student_tok, teacher_tok):
    trainer = raw_trainer(tmp_path, student_tok, teacher_tok, [{"text": " ".join(SMALL_TEXTS)}])
    assert len(trainer.train_dataset) > 3
    assert 200 < max(lengths(trainer.train_dataset)) <= 256


def test_a_stream_without_an_end(tmp_path, student_tok, teacher_tok):
    """It is encoded as it is read, by workers too, which share it; a generator also, and a stream of examples."""
    source = Source()
    trainer = raw_trainer(tmp_path, student_tok, teacher_tok, source, max_steps=3)
    trainer.train()
    assert source.read <= 512
    assert len(logged(trainer, "loss")) == 3
    examples = list(itertools.islice(trainer.train_dataset, 24))
    encoded = raw_trainer(tmp_path, student_tok, teacher_tok, (one for one in examples), max_steps=3)
    encoded.train()
    assert logged(encoded, "loss") == logged(trainer, "loss")
    encoder = lambda row: ExampleEncoder(student_tok, [teacher_tok])  # noqa: E731
    stream = EncodedStream(ROWS, encoder)
    loader = torch.utils.data.DataLoader(
        stream, 1, num_workers=2, collate_fn=lambda some: some[0]["student_ids"].tolist()
    )
    assert sorted(loader) == sorted(one["student_ids"].tolist() for one in EncodedStream(iter(ROWS), encoder))
    with pytest.raises(ValueError, match="rows: expected something to train on, got no row"):
        list(EncodedStream([], encoder))
    with pytest.raises(ValueError, match="rows: expected something to train on, got 2560 rows of which nothing is"):
        next(iter(EncodedStream(itertools.repeat({"text": ""}), encoder)))
    cut = EncodedStream(
        itertools.repeat({"prompt": "word " * 40, "completion": "answer"}),
        lambda row: ExampleEncoder(student_tok, [teacher_tok], max_length=8, train_on="completion"),
    )
    with pytest.raises(ValueError, match="rows: 2560 of 2560 are lost to rows that lose what is beyond a length limit"):
        next(iter(cut))


def test_every_option_was_looked_at():
    """An option that a new version of transformers brings has to be decided upon: here, or in `REFUSED`."""
    if transformers.__version__ != "5.24.0":
        pytest.skip("for the version that was looked through")
    assert len(NAMES) == 114, "look at the new ones"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": "4"}, "lora_rank: expected an integer of at least 1, got '4'"),
        ({"lora_rank": 4.5}, "lora_rank: expected an integer of at least 1, got 4.5"),
        ({"student_dtype": "foo"}, "student_dtype: expected 'auto', 'float32', .* got 'foo'"),
        ({"teacher_dtype": "device"}, "teacher_dtype: expected 'auto', 'float32', .* got 'device'"),
        ({"teacher_device": "foo"}, "teacher_device: expected 'auto', or a device of torch .* got 'foo'"),
        ({"loss_options": [1]}, r"loss_options: expected names and their values, got \[1\]"),
        ({"loss_options": {"temperature": "hot"}}, "loss_options: expected a number for 'temperature', got 'hot'"),
        ({"loss_options": {"reverse": 1}}, "loss_options: expected True or False for 'reverse', got 1"),
        ({"loss_options": {"top_k": 2.5}}, "loss_options: expected an integer for 'top_k', got 2.5"),
        ({"teacher_quantization": "{'a'"}, "quantization: expected JSON, got "),
        ({"loss_options": "{bad"}, "loss_options: expected JSON, got '{bad': Expecting property name"),
        ({"lr_scheduler_kwargs": "{'a': 1}"}, "lr_scheduler_kwargs: expected JSON, got "),
        ({"loss_backend": "x"}, "loss_backend: expected one of 'auto', .* got 'x'"),
        ({"train_on": "user"}, "train_on: expected one of 'all', 'completion', 'assistant', got 'user'"),
        ({"loss": ["auto", "x"]}, "loss: expected one of 'auto', .* got 'x'"),
        ({"scaling": "fixed", "max_scale": 2.0}, "max_scale: expected scaling='dynamic' with it, .* got 2.0"),
    ],
    ids=str,
)
def test_values_of_another_kind(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_one_value_for_a_list(tmp_path):
    given = {"teacher_quantization": "none", "teacher_weight": 0.5, "trust_top_k": 3, "teacher_system": "Be kind."}
    args = make_config(tmp_path, **given, teacher_dtype="bfloat16", teacher_device="cuda:1", loss_options={"top_k": 0})
    assert {name: getattr(args, name) for name in given} == {name: [one] for name, one in given.items()}


def test_options_of_teachers_that_are_built(tmp_path, student_tok, teacher_tok, examples):
    """A TeacherModel has its own, so they are refused, not ignored."""
    given = {
        "loss": "auto", "loss_options": {"temperature": 2.0}, "teacher_weight": 0.5, "trust_top_k": 1,
        "teacher_system": "x", "teacher_quantization": "none", "learn_projection": True, "teacher_average": 0.0,
        "gamma": 0.5,
    }  # fmt: skip
    teacher = make_teacher(student_tok, teacher_tok)
    assert given.keys() == set(OF_BUILT)
    for name, value in given.items():
        with pytest.raises(ValueError, match=f"{name}: expected teachers by name with it"):
            make_trainer(tmp_path, student_tok, [teacher], examples, **{name: value})


def test_a_model_is_not_overwritten(tmp_path, folders, student_tok):
    """By a student in the folder that it, or a teacher, is read from."""
    config = make_config(tmp_path)
    for output in ("student", "twin"):
        config.output_dir = f"{folders[output]}/."
        before = {path: path.read_bytes() for path in Path(folders[output]).iterdir()}
        with pytest.raises(ValueError, match=f"output_dir: expected another place than .*{output}, which is read and"):
            XTokenTrainer(folders["student"], config, folders["twin"], train_dataset=ROWS[:8])
        assert before == {path: path.read_bytes() for path in Path(folders[output]).iterdir()}


def rows_of() -> Iterator[dict[str, str]]:
    yield from ROWS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("rows.jsonl", "expected a list of rows, .* got the text 'rows.jsonl'"),
        (["one", "two"], "expected rows, mappings from columns to values, got str: 'one'"),
        (rows_of, "expected a list of rows, .* got function; call it"),
        ([], "expected something to read, got none: an empty list"),
        (3, "expected a list of rows, .* got int"),
    ],
    ids=["path", "texts", "function", "empty", "number"],
)
def test_data_of_another_kind(tmp_path, student_tok, teacher_tok, data, message):
    model, args, teacher = make_model(8, 0), make_config(tmp_path), make_teacher(student_tok, teacher_tok)
    with pytest.raises(ValueError, match=f"train_dataset: {message}"):
        XTokenTrainer(model, args, teacher, train_dataset=data, processing_class=student_tok)
    with pytest.raises(ValueError, match=rf"eval_dataset\['a'\]: {message}"):
        XTokenTrainer(model, args, teacher, eval_dataset={"a": data}, processing_class=student_tok)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "train_dataset: expected something to train on, got no row"),
     (["one"], "train_dataset: expected rows, mappings from columns to values, got str: 'one'"),
     ([*ROWS[:4], "one"], "row 4: expected a mapping from columns to values, got str")],
    ids=["empty", "texts", "later"],
)  # fmt: skip
def test_streams_of_another_kind(tmp_path, student_tok, teacher_tok, rows, message):
    model, teacher = make_model(len(student_tok), 0), make_teacher(student_tok, teacher_tok)
    trainer = XTokenTrainer(
        model, make_config(tmp_path), teacher, train_dataset=iter(rows), processing_class=student_tok
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("with_prompts", [False, True])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3, "completion": "x"}, "prompt: expected a list of messages, got int: 3"),
        ({"prompt": 3}, "expected messages, .* got prompt: int"),
        ({"messages": 5}, "messages: expected a list of messages, got int: 5"),
        ({"conversations": 5}, "conversations: expected a list of messages, got int: 5"),
        ({"prompt": [{"role": "user", "content": "x"}], "completion": "y"}, "completion: expected a list .* got str"),
    ],
    ids=str,
)
def test_columns_of_another_kind(student_tok, teacher_tok, row, message, with_prompts):
    encoder = ExampleEncoder(student_tok, [teacher_tok], with_prompts=with_prompts)
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        encoder.encode([ROWS[0], row])


def test_one_in_place_of_several(tmp_path, student_tok, teacher_tok):
    for make in (ExampleEncoder, XTokenCollator):
        for one in (teacher_tok, "teacher"):
            with pytest.raises(TypeError, match="teacher_toks: expected a sequence of tokenizers"):
                make(student_tok, one)
    for teachers, name in ((5, "teachers"), (["self", 5], r"teachers\[1\]")):
        with pytest.raises(TypeError, match=f"{name}: expected one, as a name, model or TeacherModel, got int"):
            make_trainer(tmp_path, student_tok, teachers, None)
    with pytest.raises(TypeError, match="source: expected one, as a name, model or TeacherModel, got int"):
        TeacherModel.build(5, student_tok)
