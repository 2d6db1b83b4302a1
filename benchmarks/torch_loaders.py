"""The other side of against_loaders.py, by an interpreter that has torchvision, or datasets and transformers.

Gets the mode, a folder and the size of images; prints "ready" and versions; then works once for each line of stdin, and prints
the CPU seconds.
"""

import pathlib
import sys
import time


def images(folder: pathlib.Path, size: int):
    """Returns (versions, a function that makes a training example of each file)."""
    import torch
    import torchvision
    from torchvision import transforms

    torch.set_num_threads(1)
    source = torchvision.datasets.ImageFolder(
        str(folder / "photos" / "train"),
        transforms.Compose(
            [
                transforms.RandomResizedCrop(size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        ),
    )
    return f"torchvision {torchvision.__version__}", lambda: [source[index] for index in range(len(source))]


def tokens(folder: pathlib.Path, size: int):
    """Returns (versions, a function that encodes the text)."""
    del size
    import datasets
    import transformers

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    data = datasets.load_dataset("json", data_files=str(folder / "text.jsonl"), split="train", cache_dir=str(folder))
    versions = f"datasets {datasets.__version__}, transformers {transformers.__version__}"
    return versions, lambda: data.map(
        lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text"], load_from_cache_file=False
    )


def main(mode: str, folder: str, size: str) -> None:
    """Works once for each line of stdin."""
    versions, work = {"images": images, "tokens": tokens}[mode](pathlib.Path(folder), int(size))
    print("ready", versions, flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        work()
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
