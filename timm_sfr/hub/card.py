"""The model card: `card.md` filled in with what the run wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from timm_sfr.config import in_words, is_own_folder
from timm_sfr.data.transforms import img_mode
from timm_sfr.models import SMALL_IMAGE_MODELS
from timm_sfr.models.files import PROBLEM, SEVERAL_LABELS
from timm_sfr.runs.records import taught_itself, validated
from timm_sfr.runs.scores import MULTILABEL, PERCENT, TITLES, shown_percents, task_of

TEMPLATE = Path(__file__).with_name("card.md")
TAGS = ["image-classification", "timm", "timm_sfr", "self-distillation"]
CURVE_ROWS = 10
# How the Hub names our scores: a metric, and what it is.
HUB_METRICS = {
    "top1": ("accuracy", "Top 1 Accuracy"),
    "top5": ("accuracy", "Top 5 Accuracy"),
    "map": ("mean_average_precision", "Mean Average Precision"),
    "micro_f1": ("f1", "Micro F1"),
    "macro_f1": ("f1", "Macro F1"),
    "sample_f1": ("f1", "Sample F1"),
}
# Licences of timm's weights for which the Hub has no name. Any other that it refuses is found before training.
NOT_THE_HUBS = (
    "cvnets-license", "dinov3-license", "fastvit-license", "mobileone-license", "nvidia-open-model-license", "qwen-community-1.0",
    "sapiens2-license", "seer-license",
)  # fmt: skip
# Names by which the package datasets reads files of one's own, which are no ids on the Hub.
FILE_FORMATS = ("arrow", "csv", "imagefolder", "json", "parquet", "webdataset")
FILE_ENDINGS = (".csv", ".tsv", ".txt", ".parquet", ".tar")  # of data that is one file
# Ids on the Hub of datasets that timm reads from torchvision.
ON_THE_HUB = {"torch/cifar10": "uoft-cs/cifar10", "torch/cifar100": "uoft-cs/cifar100"}


@dataclass(frozen=True)
class Facts:
    """The sources of a card: metrics.json, args.yaml and the rows of summary.csv, all empty without a run."""

    metrics: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    source: str | None = None  # ``USER/NAME[@REVISION]`` that gets the card; None for the folder on disk
    pictures: tuple[str, ...] = ()  # paths of the PNG files in the card, relative to it
    packaged: str | None = None  # the model's name in timm, if its weights come with the package
    unpublished: tuple[str, ...] = ()  # the options whose file or folder is not in the repository


def dataset_name(options: dict[str, Any]) -> str:
    """Returns the dataset's name for tags and titles: lower case, without owner, path or spaces."""
    kind, _, name = str(options.get("dataset") or "").partition("/")
    if kind in ("", "folder", "wds") or (kind, name) == ("torch", "image_folder"):  # the kind of data, and not its name
        source = PurePath(str(options.get("data_dir") or kind or "data"))
    else:
        source = PurePath(name or kind)
    word = (source.stem if source.suffix.lower() in FILE_ENDINGS else source.name).lower() or "data"
    return "".join(letter if letter.isalnum() else "_" for letter in word).strip("_") or "data"


def dataset_id(options: dict[str, Any]) -> str | None:
    """Returns the dataset's id on the Hub, or None if no id is known."""
    source = str(options.get("dataset") or "")
    given = options.get("hub_dataset") or ON_THE_HUB.get(source.lower())
    kind, _, name = source.partition("/")
    ours = is_own_folder(kind, name) or name in FILE_FORMATS
    return given or (name if kind in ("hfds", "hfids") and not ours else None)


def render(config: dict[str, Any], facts: Facts) -> str:
    """Returns the text of the card for a model with this ``config.json`` and the `facts` of its run.

    Raises:
        UndefinedError, ValueError, TypeError, KeyError: if they lack something that the card reports.
    """
    published = facts.source.split("@")[0].split("/")[-1] if facts.source else None
    name = facts.packaged or published or config["architecture"]
    metrics, options, size = facts.metrics, facts.options, config["pretrained_cfg"]["input_size"]
    task = MULTILABEL if config.get(PROBLEM) == SEVERAL_LABELS else task_of(options)
    template = Environment(undefined=StrictUndefined).from_string(TEMPLATE.read_text(encoding="utf-8"))
    card = template.render(
        card_data=card_head(name, config, facts).to_yaml(),
        name=name,
        config=config,
        metrics=metrics,
        test=metrics.get("test"),
        early=metrics.get("stopped_early"),
        options=options,
        teacher=metrics.get("teacher"),
        taught=taught_itself(facts.metrics, facts.options),
        unpublished=[f"`--{name.replace('_', '-')}`" for name in facts.unpublished],
        source=facts.source,
        packaged=facts.packaged,
        scored=validated(facts.rows),
        pictures=facts.pictures,
        curve=_curve(facts.rows, task),
        several=task == MULTILABEL,
        percents=shown_percents(task, config["num_classes"]),
        titles=TITLES,
        size=size,
        mode=options.get("input_img_mode") or (img_mode(size[0]) if size[0] in (1, 3) else None),
        data=dataset_name(options),
        split=_split(options),
        start=_start(facts),
        ours=config["architecture"] in SMALL_IMAGE_MODELS,
        imports=imports(config["architecture"]),
        in_words=in_words,
    )
    return f"{card}\n"


def card_head(name: str, config: dict[str, Any], facts: Facts) -> ModelCardData:
    """Returns the card's metadata, with the scores as the Hub reads them: in percent, with the split they were measured on."""
    best, test, options = facts.metrics.get("best"), facts.metrics.get("test"), facts.options
    results = None
    if best:
        shared = {
            "task_type": "image-classification",
            "dataset_type": dataset_id(options) or dataset_name(options),
            "dataset_name": dataset_name(options),
            "dataset_split": test["split"] if test else _split(options),
        }
        results = [
            EvalResult(metric_type=HUB_METRICS[name][0], metric_name=HUB_METRICS[name][1],
                       metric_value=round(test[name] if test else best[f"val_{name}"], 4),
                       **shared)
            for name in shown_percents(task_of(options), config.get("num_classes"))
        ]  # fmt: skip
    tags = TAGS if taught_itself(facts.metrics, facts.options) else [tag for tag in TAGS if tag != "self-distillation"]
    return ModelCardData(
        library_name="timm",
        tags=[*tags, "knowledge-distillation"] if facts.metrics.get("teacher") else tags,
        **licence_entries(config["pretrained_cfg"].get("license")),
        datasets=[known] if (known := dataset_id(options)) else None,
        base_model=facts.metrics.get("base_model"),
        pipeline_tag="image-classification",
        model_name=name,
        eval_results=results,
    )


def licence_entries(licence: str | None) -> dict[str, str | None]:
    """Returns the card's entries for a licence; one for which the Hub has no name is another licence with that name."""
    return {"license": "other", "license_name": licence} if licence in NOT_THE_HUBS else {"license": licence}


def imports(architecture: str) -> str:
    """Returns the import line for loading the model: timm alone does not know the architectures that this package adds."""
    return f"import timm{', timm_sfr' if architecture in SMALL_IMAGE_MODELS else ''}"


def _curve(rows: list[dict[str, Any]], task: str) -> list[tuple[float, ...]]:
    """Returns up to CURVE_ROWS evenly spaced validated epochs, the last included: epoch from 1, both losses, main score."""
    names = ("train_loss", "val_loss", f"val_{PERCENT[task][0]}")
    rows = [row for row in rows if row["val_loss"] != ""]
    step = max(1, -(-len(rows) // CURVE_ROWS))
    return [(int(row["epoch"]) + 1, *(float(row[name]) for name in names)) for row in rows[::-1][::step][::-1]]


def _start(facts: Facts) -> str:
    """Returns a name for the initial weights, or an empty string if training started from scratch."""
    name = facts.metrics.get("base_model") or PurePath(facts.options.get("initial_checkpoint") or "").name
    return name or ("another model" if facts.options.get("pretrained") else "")


def _split(options: dict[str, Any]) -> str:
    return "validation" if options.get("dataset") == "digits" else str(options.get("val_split", "validation"))


def base_model(pretrained: bool, model: str, config: dict[str, Any]) -> str | None:
    """Returns the Hub repository of the initial weights, or None if training starts from scratch or from a local file."""
    known = config.get("hf_hub_id") if pretrained and not model.startswith("local-dir:") else None
    return known.split("@")[0] if known else None
