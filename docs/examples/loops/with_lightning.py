"""A LightningModule, which knows how many steps there will be when it makes its optimizer.

python docs/examples/loops/with_lightning.py
"""

from lightning import LightningModule, Trainer
from small_problem import make_loader, make_network, mse

from l2l_lightning import LearnedOptimizer


class Regression(LightningModule):
    """A network that is trained by a rule."""

    def __init__(self):
        super().__init__()
        self.network = make_network()

    def training_step(self, batch, _):
        """Returns the loss of a minibatch, ([B, 8], [B, 1])."""
        inputs, labels = batch
        return mse(self.network(inputs), labels)

    def configure_optimizers(self):
        """Returns the optimizer; accumulated gradients and several processes are in the number of steps."""
        return LearnedOptimizer(self.parameters(), total_steps=self.trainer.estimated_stepping_batches)


def main():
    """Returns the trained network."""
    model = Regression()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet).fit(model, make_loader())
    return model.network


if __name__ == "__main__":
    print(main())
