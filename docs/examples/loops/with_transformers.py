"""The Trainer of Hugging Face's transformers, without the schedule and the clipping that it adds by itself.

python docs/examples/loops/with_transformers.py
"""

from small_problem import BATCH, STEPS, make_data, make_network, mse
from torch import nn
from transformers import Trainer, TrainingArguments

from l2l_lightning import LearnedOptimizer


class Regression(nn.Module):
    """A model as the Trainer wants it: of named inputs, and with the loss in what it returns."""

    def __init__(self):
        super().__init__()
        self.network = make_network()

    def forward(self, inputs, labels):
        """Returns the loss of inputs [B, 8] and labels [B, 1], and the predictions [B, 1]."""
        predicted = self.network(inputs)
        return {"loss": mse(predicted, labels), "logits": predicted}


def main(folder="trainer_output", **more):
    """Returns the trained network; more are other arguments of the Trainer's."""
    model = Regression()
    arguments = {
        "max_steps": STEPS,
        "lr_scheduler_type": "constant",  # "linear" else, and it would multiply the rule's own schedule
        "max_grad_norm": 0.0,  # no clipping
        "train_sampling_strategy": "sequential",  # for this comparison: leave it to shuffle
        "per_device_train_batch_size": BATCH,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    examples = [{"inputs": inputs, "labels": labels} for inputs, labels in make_data()]
    optimizer = LearnedOptimizer(model.parameters(), total_steps=STEPS)
    Trainer(
        model,
        TrainingArguments(folder, **arguments | more),
        train_dataset=examples,
        optimizers=(optimizer, None),
    ).train()
    return model.network


if __name__ == "__main__":
    print(main())
