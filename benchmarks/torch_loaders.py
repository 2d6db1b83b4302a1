"""The other side of against_loaders.py, by an interpreter that has torchvision, or datasets and transformers.

images FOLDER SIZE prints "ready" and versions, then works once for each line of stdin, and prints the CPU seconds.
tokens FOLDER PROCESSES OUTPUT tokenizes the folder's text.jsonl once. versions prints those of the packages for tokens.
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


def tokens(folder: pathlib.Path, processes: int, output: str) -> None:
    """Tokenizes text.jsonl and writes the ids."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    data = datasets.load_dataset(
        "json", data_files=str(folder / "text.jsonl"), split="train", cache_dir=output + ".cache"
    )
    ids = data.map(
        lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]},
        batched=True,
        num_proc=processes,
        remove_columns=["text"],
    )
    ids.save_to_disk(output)


def main(mode: str, folder: str = "", *rest: str) -> None:
    """images: works once for each line of stdin."""
    if mode == "versions":
        import datasets
        import transformers

        print(f"datasets {datasets.__version__}, transformers {transformers.__version__}")
    elif mode == "tokens":
        processes, output = rest
        tokens(pathlib.Path(folder), int(processes), output)
    else:
        versions, work = images(pathlib.Path(folder), int(rest[0]))
        print("ready", versions, flush=True)
        for _ in sys.stdin:
            start = time.process_time()
            work()
            print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
