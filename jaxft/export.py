"""Writes a trained checkpoint for another library, for another run, or as one file that runs without jaxft.

python -m jaxft.export --workdir runs/cifar10 --to torchvision --out resnet50-cifar10.pth
python -m jaxft.export --workdir runs/cifar10 --to flax --out cifar10.safetensors
python -m jaxft.export --workdir runs/cifar10 --to stablehlo --out cifar10.zip [--dtype int8] [--platform cpu]

torchvision, torch: with torchvision's names, or those of the library of the pretrained weights (timm, transformers);
load it by torchvision.models.resnet50(num_classes=10).load_state_dict(torch.load("resnet50-cifar10.pth")).
flax: start another run from it with --config.model.pretrained=cifar10.safetensors.
stablehlo: the network with its preprocessing, for CPU, GPU and TPU. It takes uint8 images (N, height, width, 3) of any
number and size and returns the probabilities (N, classes) that predict returns. For a run with tags, a number or
several targets, it returns a dict of the probabilities or values (N,) of each. examples/run_exported.py runs it with
only JAX (pip install jax flatbuffers pillow). JAX reads such a file for six months: keep the workdir, to export again.
A file for one --platform runs only there, and faster: on a CPU several times as fast for small images.
"""

if __name__ == "__main__":  # a command's process is prepared before JAX is imported
    from jaxft.cli import run

    run("export")

import dataclasses
import json
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxft.config import resolve
from jaxft.data.batches import replicate
from jaxft.errors import ArgumentParser, UserError, shortened, write_message
from jaxft.files import atomic_write, output_argument, reason
from jaxft.models.fold import fold_head_norm, fold_norms
from jaxft.models.network import options_of
from jaxft.models.policy import eval_logits
from jaxft.ops.formulation import Formulation
from jaxft.pretrained.convert import loading_notes, naming_of, own_sizes, to_torch
from jaxft.pretrained.torch_files import write_tensors
from jaxft.pretrained.weights_file import Weights, write_weights
from jaxft.run.metrics_file import read_scores
from jaxft.run.remote_workdir import reading_folder
from jaxft.run.workdir import Workdir
from jaxft.targets import joint
from jaxft.targets.joint import find_metric, format_metric, is_one_class, targets_of
from jaxft.targets.tags import TagsTarget
from jaxft.training.evaluation import evaluate_checkpoint
from jaxft.training.restore import LoadedCheckpoint, load_checkpoint
from jaxft.transforms.pillow_resize import TALL_BY_HEIGHT
from jaxft.transforms.preprocessing import Preprocessing, normalize, resize_and_crop_any

SUFFIXES = {
    "torchvision": (".pth", ".safetensors"),
    "torch": (".pth", ".safetensors"),
    "flax": (".safetensors",),
    "stablehlo": (".zip",),
}

DTYPES = {
    "torchvision": ("float32",),
    "torch": ("float32",),
    "flax": ("float32", "float16"),
    "stablehlo": ("float32", "bfloat16", "float16", "int8"),
}

READABLE = "JAX guarantees to read it for six months"  # docs.jax.dev/en/latest/export/export.html

FORMULATIONS: dict[str, Formulation] = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}  # by jax.export's platforms


def export_torchvision(checkpoint: LoadedCheckpoint, out: Path, to: str = "torchvision") -> None:
    """Writes a state_dict (.pth or .safetensors) that the model of torchvision or timm loads with strict=True.

    to: torchvision, or torch for the names of the library that the run's pretrained weights come from. What differs in
    that library's network is reported on stderr. Raises UserError if torchvision does not have the network.
    """
    state = jax.device_get(checkpoint.state)
    stored, arch = resolve(checkpoint.info["config"]).data.stored_size, checkpoint.info["config"]["model"]["arch"]
    variables = fold_head_norm(state.variables(), checkpoint.model.head)
    options = {"arch": arch, **options_of(checkpoint.model), "num_classes": checkpoint.model.num_classes}
    weights = Weights(variables, checkpoint.info["weights"] | options)
    naming = naming_of(weights, "" if to == "torch" else to)
    write_tensors(out, to_torch(weights, naming))
    preprocessing = Preprocessing(**checkpoint.info["preprocessing"])
    sizes = [(stored, stored)] if stored else []
    sizes.append((preprocessing.resize or preprocessing.image_size, preprocessing.image_size))
    kind = preprocessing.interpolation
    named = "" if kind == "bilinear" else f", InterpolationMode.{kind.upper()}"  # bilinear is Resize's own default
    steps = [f"Resize({resize}{named}), CenterCrop({size})" for resize, size in sizes]
    print(
        f"{out}: {arch}, {outputs_text(checkpoint)}, of checkpoint {checkpoint.step}, with the names of "
        f"{naming.library}; prepare images by "
        f"{', '.join(steps)}, ToTensor() and Normalize({preprocessing.mean}, {preprocessing.std})",
        flush=True,
    )
    for line in column_lines(checkpoint):
        print(line, flush=True)
    theirs, ours = checkpoint.model.options, options_of(checkpoint.model)
    if own_sizes(checkpoint.model):
        named = " and ".join(f"model.{key} {value}" for key, value in theirs.items())
        write_message(
            f"warning: {naming.library}'s {arch} cannot load {out}: it has {named}, this run "
            f"{' and '.join(map(str, ours.values()))}"
        )
    for note in loading_notes(weights, naming):
        write_message(f"warning: {out}: {note}")


def outputs_text(checkpoint: LoadedCheckpoint) -> str:
    """Returns a description of the network's outputs: '10 classes' or '14 outputs for species, tags, brightness'."""
    targets = targets_of(checkpoint.info)
    if is_one_class(targets):
        return f"{checkpoint.model.num_classes} classes"
    return f"{checkpoint.model.num_classes} outputs for {shortened([target.field.name for target in targets], 5)}"


def column_lines(checkpoint: LoadedCheckpoint) -> list[str]:
    """Returns a line for each target with its columns of the logits and the formula of its outputs.

    There are none for a single class without a temperature, whose outputs are the softmax of the logits.
    """
    targets, calibrations = targets_of(checkpoint.info), checkpoint.info.get("calibration", {})
    if is_one_class(targets) and not calibrations:
        return []
    lines = ["the file has only logits; temperatures, thresholds and units are not in it:"]
    start = 0
    for target in targets:
        field, calibration = target.field, calibrations.get(target.field.name, {})
        stop = start + field.num_outputs
        columns = f"column {start}" if field.num_outputs == 1 else f"columns {start} to {stop - 1}"
        scaled = f"logits / {calibration['temperature']:.6g}" if "temperature" in calibration else "logits"
        if isinstance(target, TagsTarget):
            pairs = zip(field.names, target.thresholds(calibration), strict=True)
            thresholds = shortened([f"{name} {threshold:.6g}" for name, threshold in pairs], 5)
            formula = f"sigmoid({scaled}), thresholds {thresholds}"
        elif field.kind == "class":
            formula = f"softmax({scaled}), classes {shortened(field.names, 5)}"
        else:
            formula = f"logits * {field.std:.9g} + {field.mean:.9g}"
        lines.append(f"  {field.name}: {columns}, {formula}")
        start = stop
    return lines


def export_flax(workdir: Path, checkpoint: LoadedCheckpoint, out: Path, dtype: str) -> None:
    """Writes a jaxft weights file for another run's model.pretrained, with its provenance."""
    step, info, model, _, state = checkpoint
    state = jax.device_get(state)
    variables = fold_head_norm(state.variables(), model.head)
    scores = read_scores(Workdir(workdir).metrics) or {}
    config = info["config"]
    resolved = resolve(config)
    # Scores are of the validation split if there is one.
    tested = find_metric(targets_of(info), resolved.best_metric) == "accuracy" and not resolved.data.val_split
    provenance = {
        "arch": config["model"]["arch"],
        **options_of(model),
        "num_classes": model.num_classes,
        "source": f"step {step} of a jaxft run on {config['data']['name'].split('/')[-1]}",
        "mean": info["preprocessing"]["mean"],
        "std": info["preprocessing"]["std"],
        "eval_accuracy": scores.get(step) if tested else None,
        **({"names": info["weights"]["names"]} if "names" in info["weights"] else {}),
        **{key: info[key] for key in ("config", "class_names", "preprocessing", "train_size", "weights", "versions")},
        **{key: info[key] for key in ("targets", "calibration") if info.get(key)},
    }
    write_weights(out, Weights(jax.tree.map(lambda a: a.astype(dtype), variables), provenance))
    print(f"{out}: {provenance['arch']}, {outputs_text(checkpoint)}, {dtype}, of checkpoint {step}")


def compress(variables: Any, dtype: str) -> dict[str, Any]:
    """Converts kernels to a smaller dtype; norms and biases stay float32. int8 kernels become (int8, float32 scale).

    int8 is symmetric with one scale per output channel (Jacob et al. 2018, https://arxiv.org/abs/1712.05877).
    """

    def compressed(kernel: np.ndarray) -> Any:
        if dtype != "int8":
            return kernel.astype(jnp.dtype(dtype))
        scale = np.abs(kernel).max(tuple(range(kernel.ndim - 1))) / np.float32(127)
        return np.rint(kernel / np.where(scale, scale, 1)).astype(np.int8), scale

    flat = flatten_dict(jax.device_get(variables))
    return unflatten_dict({path: compressed(leaf) if path[-1] == "kernel" else leaf for path, leaf in flat.items()})


def decompress(variables: Any) -> Any:
    """Converts the result of `compress` to float32; call it in a traced function, whose constants stay compressed."""

    def decompressed(leaf: Any) -> jax.Array:
        if isinstance(leaf, tuple):
            return jnp.asarray(leaf[0]).astype(jnp.float32) * leaf[1]
        return jnp.asarray(leaf).astype(jnp.float32)

    return jax.tree.map(decompressed, variables, is_leaf=lambda leaf: isinstance(leaf, tuple))


def export_stablehlo(checkpoint: LoadedCheckpoint, out: Path, dtype: str, platform: str | None = None) -> None:
    """Writes a zip archive of model.stablehlo (jax.export's own format) and info.json.

    The file runs on all platforms in the plain formulation, or only on `platform` in the formulation of that platform.
    It resizes images as `predict` does, in two steps if the run has data.stored_size. It returns the probabilities of a
    single class, or {target: outputs}. info.json has the targets if they are not a single class, and the calibration.
    """
    platforms = (platform,) if platform else tuple(FORMULATIONS)
    formulation = FORMULATIONS[platform] if platform else "plain"
    preprocessing = Preprocessing(**checkpoint.info["preprocessing"])
    stored_size = resolve(checkpoint.info["config"]).data.stored_size
    model, variables = fold_norms(checkpoint.model.clone(formulation=formulation), checkpoint.state.variables())
    variables = compress(variables, dtype)
    targets, calibrations = targets_of(checkpoint.info), checkpoint.info.get("calibration", {})

    @jax.jit
    def network(image: jax.Array) -> Any:
        size, _, _, resize, interpolation = preprocessing
        pixels = resize_and_crop_any(image, size, resize, stored_size, interpolation, tall_by_height=TALL_BY_HEIGHT)
        image = normalize(pixels, preprocessing)
        logits = eval_logits(model, decompress(variables), image, checkpoint.policy)
        outputs = {
            target.field.name: target.outputs(own, calibrations.get(target.field.name, {}))
            for target, own, _ in joint.each(targets, logits)
        }
        return outputs[targets[0].field.name] if is_one_class(targets) else outputs

    shape = (*jax.export.symbolic_shape("images, height, width"), 3)
    exported = jax.export.export(network, platforms=platforms)(jax.ShapeDtypeStruct(shape, jnp.uint8))
    needs = {"jax": f">={version('jax')}", "flatbuffers": "any", "until": READABLE}
    info = {"dtype": dtype, "platforms": platforms, "checkpoint": checkpoint.step, "needs": needs, **checkpoint.info}
    try:
        with atomic_write(out) as file, zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model.stablehlo", exported.serialize())
            archive.writestr("info.json", json.dumps(info, indent=2))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {reason(error)}; name another file") from None
    print(
        f"{out}: {checkpoint.info['config']['model']['arch']}, {outputs_text(checkpoint)}, of checkpoint "
        f"{checkpoint.step}, {dtype}, {out.stat().st_size / 1e6:.2f} MB, for {', '.join(platforms)}; needs jax "
        f"{version('jax')} or newer and flatbuffers; {READABLE}, so keep the workdir",
        flush=True,
    )


def compressed_scores(
    checkpoint: LoadedCheckpoint, metric: str, dtype: str, data_dir: str | None
) -> tuple[float | None, float | None]:
    """Returns a metric on the run's test split: with the checkpoint's weights, and with compressed ones.

    metric: its full name. Raises UserError if the test images cannot be read.
    """
    try:
        before = _score(checkpoint, metric, data_dir)
    except UserError as error:
        remedy = "name their folder with --data_dir, or export --dtype float32, which needs none"
        raise UserError(f"comparing the {metric} needs the test images: {error}; {remedy}") from None
    model, variables = fold_norms(checkpoint.model, checkpoint.state.variables())
    variables = {"batch_stats": {}} | decompress(compress(variables, dtype))
    smaller = replicate(dataclasses.replace(checkpoint.state, **variables, ema={}))
    return before, _score(checkpoint._replace(model=model, state=smaller), metric, data_dir)


def _score(checkpoint: LoadedCheckpoint, metric: str, data_dir: str | None) -> float | None:
    found = evaluate_checkpoint(checkpoint, data_dir)
    scores = joint.scores(found.targets, found.predictions, found.calibrations)
    return joint.flat_scores(found.targets, scores).get(metric)


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.export", __doc__)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="workdir of the run")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or the number of a step")
    parser.add_argument("--to", required=True, choices=list(SUFFIXES))
    parser.add_argument(
        "--out", required=True, type=output_argument, metavar="FILE", help="a .pth, .safetensors or .zip file"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES["stablehlo"],
        help="dtype of the weights: flax also takes float16; stablehlo takes any and prints best_metric with both",
    )
    parser.add_argument(
        "--platform",
        choices=list(FORMULATIONS),
        help="stablehlo: export only for this platform, in the formulation that is fastest there",
    )
    parser.add_argument("--data_dir", help="folder of the images, or of prepared TFDS datasets, if it has moved")
    args = parser.parse_args(argv)
    if args.out.suffix not in SUFFIXES[args.to]:
        raise UserError(f"--out must end in {' or '.join(SUFFIXES[args.to])}, not {args.out}")
    if args.dtype not in DTYPES[args.to]:
        raise UserError(f"--to {args.to} takes --dtype {' or '.join(DTYPES[args.to])}, not {args.dtype}")
    if args.platform and args.to != "stablehlo":
        raise UserError(f"--platform is for --to stablehlo; a {args.to} file holds weights, which run everywhere")
    checkpoint = load_checkpoint(args.workdir, args.checkpoint)
    if args.to in ("torch", "torchvision"):
        export_torchvision(checkpoint, args.out, args.to)
    elif args.to == "flax":
        export_flax(reading_folder(args.workdir), checkpoint, args.out, args.dtype)
    else:
        targets = targets_of(checkpoint.info)
        best_metric = resolve(checkpoint.info["config"]).best_metric
        metric = find_metric(targets, best_metric)
        # First the scores, so that nothing is written if there are no images to test with.
        compared = args.dtype != "float32"
        scores = compressed_scores(checkpoint, metric, args.dtype, args.data_dir) if compared else ()
        export_stablehlo(checkpoint, args.out, args.dtype, args.platform)
        if scores:
            before, after = (format_metric(metric, score) for score in scores)
            print(f"{metric} {before} with the weights of the checkpoint, {after} with {args.dtype}")
