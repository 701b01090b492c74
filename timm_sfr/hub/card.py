"""The model card: everything in it is read from what the run wrote, nothing typed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from timm_sfr.config import in_words
from timm_sfr.data.transforms import img_mode
from timm_sfr.method.smoothing import own_epsilon
from timm_sfr.models import SMALL_IMAGE_MODELS

TAGS = ["image-classification", "timm", "timm_sfr", "self-distillation"]
CURVE, CURVE_ROWS = ("train_loss", "val_loss", "val_top1"), 10
# Licences of timm's weights that the Hub has no name for; any other that it does not take is found before training.
NOT_THE_HUBS = (
    "cvnets-license", "dinov3-license", "fastvit-license", "mobileone-license", "nvidia-open-model-license", "qwen-community-1.0",
    "sapiens2-license", "seer-license",
)  # fmt: skip
# torchvision's names for what the Hub has under an owner's.
ON_THE_HUB = {"torch/cifar10": "uoft-cs/cifar10", "torch/cifar100": "uoft-cs/cifar100"}


@dataclass(frozen=True)
class Facts:
    """What a card is made from.

    Attributes:
        metrics: What the run's metrics.json holds; empty where no run is known.
        options: The run's resolved options, as its args.yaml.
        rows: The rows of its summary.csv.
        source: ``USER/NAME[@REVISION]`` that the card is for, None for the folder on the disk.
        pictures: PNG files that go with the card, as seen from it.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    source: str | None = None
    pictures: tuple[str, ...] = ()


def dataset_name(options: dict[str, Any]) -> str:
    """A dataset's name in a tag or a title: lower case, without owner, path or spaces."""
    source = options.get("dataset") or options.get("data_dir") or "data"
    word = PurePath(str(source)).stem.lower() or "data"
    return "".join(letter if letter.isalnum() else "_" for letter in word).strip("_") or "data"


def dataset_id(options: dict[str, Any]) -> str | None:
    """The dataset's id on the Hub, where it is known to have one."""
    source = str(options.get("dataset") or "")
    given = options.get("hub_dataset") or ON_THE_HUB.get(source.lower())
    return given or (source.removeprefix("hfds/") if source.startswith("hfds/") else None)


def render(config: dict[str, Any], facts: Facts) -> str:
    """The card of a model from its ``config.json`` and what is known of its run."""
    name = facts.source.split("@")[0].split("/")[-1] if facts.source else config["architecture"]
    parts = [f"---\n{card_head(name, config, facts).to_yaml()}\n---", f"# {name}", _summary(config, facts)]
    if facts.metrics:
        parts += [_scores(facts), _recipe(facts), _curve(facts), _pictures(facts)]
    parts.insert(3, _usage(config, facts))
    return "\n\n".join(part for part in parts if part) + "\n"


def card_head(name: str, config: dict[str, Any], facts: Facts) -> ModelCardData:
    """The head of the card, with the scores as the Hub reads them (percent, on the split that they were measured on)."""
    best, options = facts.metrics.get("best"), facts.options
    licence = config["pretrained_cfg"].get("license")
    named, results = licence in NOT_THE_HUBS, None
    if best:
        shared = {
            "task_type": "image-classification",
            "dataset_type": dataset_id(options) or dataset_name(options),
            "dataset_name": dataset_name(options),
            "dataset_split": _split(options),
        }
        results = [
            EvalResult(metric_type="accuracy", metric_name=f"Top {k} Accuracy", metric_value=round(best[f"val_top{k}"], 4),
                       **shared)
            for k in (1, 5)
        ]  # fmt: skip
    tags = TAGS if facts.metrics.get("sfr") else [tag for tag in TAGS if tag != "self-distillation"]
    return ModelCardData(
        library_name="timm",
        tags=[*tags, "knowledge-distillation"] if facts.metrics.get("teacher") else tags,
        license="other" if named else licence,
        license_name=licence if named else None,
        datasets=[known] if (known := dataset_id(options)) else None,
        base_model=facts.metrics.get("base_model"),
        pipeline_tag="image-classification",
        model_name=name,
        eval_results=results,
    )


def _summary(config: dict[str, Any], facts: Facts) -> str:
    classes, size = config["num_classes"], config["pretrained_cfg"]["input_size"]
    text = f"`{config['architecture']}` for {classes} classes at {size[1]} x {size[2]} pixels."
    if not facts.metrics:
        return text + " Published with timm_sfr; no run with measured scores belongs to these weights."
    metrics, options = facts.metrics, facts.options
    where, size_of = dataset_name(options), f" It has {metrics['parameters'] / 1e6:.2f} M parameters."
    source = metrics.get("base_model") or PurePath(options.get("initial_checkpoint") or "").name
    source = source or ("another model" if options.get("pretrained") else "")
    start = f"Training started from the weights of {source}." if source else ""
    taught = _taught(metrics["teacher"], options) if metrics.get("teacher") else ""
    if not metrics["sfr"]:
        plain = f"{text}{size_of} Trained on {where}, without Self-Feature Regularization, by timm_sfr."
        return " ".join(part for part in (plain, taught, start) if part)
    taught = taught or "There was no teacher."
    smoothed = _smoothed(options, metrics["epochs"])
    sfr = (
        f"while it trained, its deep features taught its shallow ones (matching `{options['sfr_matching']}`, channels "
        f"`{options['sfr_channels']}`, weight {options['sfr_weight']:g}) and its labels were smoothed {smoothed}"
    )
    return (
        f"{text}{size_of} Trained on {where} by timm_sfr with Self-Feature Regularization, SFR (the idea of "
        f"[arXiv:2103.07350](https://arxiv.org/abs/2103.07350), a withdrawn paper): {sfr}. {taught} SFR adds "
        f"nothing at inference: these are the weights of the plain network. {start}"
    ).strip()


def _smoothed(options: dict[str, Any], epochs: int) -> str:
    """How the labels were smoothed in a run of `epochs` epochs, in a few words."""
    if options["smoothing"] is None:
        epsilon = own_epsilon(options["num_classes"], epochs)
        return f"by up to {epsilon:.2g}, which follows from the number of classes and epochs"
    source = options["sfr_smoothing_source"] or "uniform"
    return f"by {options['smoothing']:g} (`{source}`, `{options['sfr_smoothing_schedule']}`)"


def _taught(teacher: dict[str, Any], options: dict[str, Any]) -> str:
    """Who taught it besides, how, and under which terms that teacher's weights are."""
    name = f"`{teacher['name']}`"
    if teacher["source"]:
        name = f"[{name}](https://huggingface.co/{teacher['source'].split('@')[0]})"
    licence = f"under {teacher['license']}" if teacher["license"] else "under a licence that is not known here"
    kind, heated = in_words(options["kd_distill_type"], options["kd_token_distill_type"])
    heat = f" at temperature {options['kd_temperature']:g}" if heated else ""
    return (
        f"A teacher, {'the run ' if teacher['folder'] else ''}{name} ({teacher['architecture']}, "
        f"{teacher['parameters'] / 1e6:.2f} M parameters, weights {licence}), taught it too, by {kind} distillation{heat}: the "
        f"loss was {teacher['task_loss_weight']:g} x that of the labels + {teacher['distill_loss_weight']:g} x that of the "
        f"distillation{' + that of SFR' if options.get('sfr', True) else ''}."
    )


def _usage(config: dict[str, Any], facts: Facts) -> str:
    """Four lines: model, transform, probabilities, the best five by name."""
    source = f"hf-hub:{facts.source}" if facts.source else "local-dir:."
    ours = config["architecture"] in SMALL_IMAGE_MODELS
    mode = img_mode(config["pretrained_cfg"]["input_size"][0])
    names = 'model.pretrained_cfg["label_names"][i]' if config.get("label_names") else "i"
    top = min(5, config["num_classes"])
    note = "\n\n`pip install timm-sfr` first: its import adds this architecture to timm." if ours else ""
    return f"""## Use{note}

```python
{imports(config["architecture"])}
from PIL import Image

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
p, index = model(transform(Image.open("image.png").convert("{mode}"))[None]).softmax(1)[0].topk({top})
print([({names}, round(v, 4)) for v, i in zip(p.tolist(), index.tolist())])
```"""


def imports(architecture: str) -> str:
    """The import that loading takes: timm itself does not know the architectures that this package adds."""
    return f"import timm{', timm_sfr' if architecture in SMALL_IMAGE_MODELS else ''}"


def _scores(facts: Facts) -> str:
    best, last, metrics = facts.metrics["best"], facts.metrics["last"], facts.metrics
    lines = [
        f"| {what} | {row['epoch'] + 1} | {row['val_top1']:.2f} | {row['val_top5']:.2f} | {row['val_loss']:.4f} | "
        f"{row['ece']:.4f} |"
        for what, row in (("these weights: best epoch", best), ("last epoch", last))
    ]
    return f"""## Scores

On split `{_split(facts.options)}` of {dataset_name(facts.options)} ({best["images"]} images), one run, seed {metrics["seed"]}:

| | epoch | top-1 % | top-5 % | loss | ECE |
|---|---:|---:|---:|---:|---:|
{chr(10).join(lines)}

ECE is the expected calibration error.
The best epoch was chosen by `{metrics["eval_metric"]}` on that same split, so its score is optimistic."""


def _recipe(facts: Facts) -> str:
    metrics, options = facts.metrics, facts.options
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    where = "beside this card" if facts.source else "in the folder above"
    own = ["`--data-dir`, where your copy of the data lies"] if options.get("data_dir") else []
    own += ["`--kd-model-name`, where its teacher lies"] if (metrics.get("teacher") or {}).get("folder") else []
    data = f" (give {', and '.join(own)})" if own else ""
    done = [f"{metrics['epochs']} epoch{'s' * (metrics['epochs'] > 1)}"]
    done += [f"{name} {options[name]}" for name in ("opt", "lr", "batch_size") if options.get(name) is not None]
    done += [f"{metrics['mixed_precision']} mixed precision", f"{metrics['seconds']:.0f} s on {metrics['hardware']}"]
    return f"""## Recipe

`train-sfr --config args.yaml` (`pip install timm-sfr`), with the `args.yaml` {where}, repeats it{data}.
{", ".join(done)};
{versions}."""


def _curve(facts: Facts) -> str:
    rows = [row for row in facts.rows if row["val_top1"] != ""]
    if not rows:
        return ""
    step = max(1, -(-len(rows) // CURVE_ROWS))
    shown = rows[::-1][::step][::-1]
    lines = [
        f"| {int(row['epoch']) + 1} | " + " | ".join(f"{float(row[name]):.4f}" for name in CURVE) + " |"
        for row in shown
    ]
    return "## Curve\n\n| epoch | train loss | val loss | val top-1 % |\n|---:|---:|---:|---:|\n" + "\n".join(lines)


def _pictures(facts: Facts) -> str:
    titles = {"curves": "Curves of the run", "confusion": "Confusion matrix, rows are classes",
              "reliability": "Accuracy against confidence"}  # fmt: skip
    return "\n\n".join(f"![{titles[PurePath(name).stem]}]({name})" for name in facts.pictures)


def _split(options: dict[str, Any]) -> str:
    return "validation" if options.get("dataset") == "digits" else str(options.get("val_split", "validation"))


def base_model(pretrained: bool, model: str, config: dict[str, Any]) -> str | None:
    """Whose weights training started from: their repository on the Hub, or None if from scratch or from a local file."""
    known = config.get("hf_hub_id") if pretrained and not model.startswith("local-dir:") else None
    return known.split("@")[0] if known else None
