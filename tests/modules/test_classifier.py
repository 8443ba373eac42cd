import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_ext._lightning import Trainer
from lightning_ext.modules import Classifier
from tests.conformance.toys import rows

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def test_it_minimises_cross_entropy_with_the_optimizer_it_was_given():
    torch.manual_seed(0)
    module = Classifier(nn.Linear(6, 3), functools.partial(torch.optim.SGD, lr=0.5))
    weight = module.network.weight.detach().clone()
    x, t = rows().tensors
    loss = F.cross_entropy(F.linear(x, weight.requires_grad_(), module.network.bias.detach()), t)
    (grad,) = torch.autograd.grad(loss, weight)
    trainer = Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    trainer.fit(module, DataLoader(rows(), batch_size=12))
    torch.testing.assert_close(module.network.weight.detach(), weight.detach() - 0.5 * grad)
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], loss.detach())


def test_it_evaluates_and_predicts():
    module = Classifier(nn.Linear(6, 3))
    loader = DataLoader(rows(), batch_size=5)
    trainer = Trainer(**QUIET)
    found = trainer.validate(module, loader, verbose=False)[0]
    x, t = rows().tensors
    with torch.no_grad():
        logits = module(x)
    assert abs(found["val/accuracy"] - (logits.argmax(1) == t).float().mean().item()) < 1e-6
    assert abs(found["val/loss"] - F.cross_entropy(logits, t).item()) < 1e-6
    assert trainer.test(module, loader, verbose=False)[0]["test/accuracy"] == found["val/accuracy"]
    torch.testing.assert_close(torch.cat(trainer.predict(module, loader)), logits)
