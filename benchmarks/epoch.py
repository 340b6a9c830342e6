"""Times a whole epoch, from image files to the accuracy: `jaxft train` against the PyTorch script that it replaces.

python -m benchmarks.epoch [--rounds 3] [--image_size 64] [--pictures FOLDER] [--config.KEY=VALUE ...]

Trains a ResNet-50 for one epoch with the settings of configs/cifar10.py and evaluates it: on the sample of CIFAR-10
(2,000 images to train, 1,000 to test), or on the images in FOLDER/train/CLASS and FOLDER/test/CLASS. The contenders
take turns, each in its own process. Their wall time includes imports, compilation, checkpoint and report. jaxft runs
twice, the first time with an empty compilation cache. PyTorch uses channels_last, a GPU if there is one, and two
DataLoader workers in which Pillow resizes the images. --config.KEY=VALUE applies to jaxft only. Prints one JSON line
with the median seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path


def torch_epoch(folder: Path, image_size: int) -> None:
    """Trains and evaluates as the usual torchvision script does."""
    from typing import Any

    from tests.helpers.reference import torch, torchvision

    transforms = torchvision.transforms
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = transforms.Compose([transforms.Resize(image_size), transforms.ToTensor(), normalize])
    train, test = (torchvision.datasets.ImageFolder(str(folder / split), transform) for split in ("train", "test"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = torchvision.models.resnet50(num_classes=len(train.classes))
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    for images, labels in torch.utils.data.DataLoader(train, 64, shuffle=True, num_workers=2):
        optimizer.zero_grad()
        images = images.to(device, memory_format=torch.channels_last)
        torch.nn.functional.cross_entropy(model(images), labels.to(device)).backward()
        optimizer.step()
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in torch.utils.data.DataLoader(test, 64, num_workers=2):
            logits = model(images.to(device, memory_format=torch.channels_last))
            correct += int((logits.argmax(1).cpu() == labels).sum())
    print(f"Test Accuracy: {correct / len(test):.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--torch", type=Path, help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.torch:
        torch_epoch(args.torch, args.image_size)
        return
    seconds: dict[str, list[float]] = {"jaxft_first": [], "jaxft_again": [], "torch": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            pictures = args.pictures or folder / "pictures"
            if not args.pictures:
                with tarfile.open("jaxft/samples/cifar10.tar.xz") as tar:
                    tar.extractall(pictures, filter="data")
            env = os.environ | {"JAXFT_CACHE": str(folder / "cache")}
            jaxft = [
                "jaxft.train",
                "--config=configs/cifar10.py",
                "--config.model.pretrained=",
                "--config.num_epochs=1",
                f"--config.data.name=folder:{pictures}",
                f"--config.image_size={args.image_size}",
                *rest,
            ]
            commands = {
                "jaxft_first": [*jaxft, f"--workdir={folder / 'first'}"],
                "jaxft_again": [*jaxft, f"--workdir={folder / 'again'}"],
                "torch": ["benchmarks.epoch", f"--torch={pictures}", f"--image_size={args.image_size}"],
            }
            for name, command in commands.items():
                started = time.monotonic()
                subprocess.run([sys.executable, "-m", *command], env=env, stdout=subprocess.DEVNULL, check=True)
                seconds[name].append(time.monotonic() - started)
    medians = {name: round(statistics.median(values), 1) for name, values in seconds.items()}
    print(json.dumps({"image_size": args.image_size, "seconds": medians}))


if __name__ == "__main__":
    main()
