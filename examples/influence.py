r"""
Influence functions, and how far to trust them
==============================================

*What would my model say had this training example not been there?* ``InfluenceModule`` (after Bae et al., NeurIPS 2022,
arXiv 2209.05364) answers for every training example at once, through ``trainer.predict``, and says how well the linear
systems behind the answer were solved. What damped influence estimates in a network is not retraining but the proximal
Bregman response; ``PBRFModule`` computes that, so that the estimate can be checked.
"""

# %%
# Train as always
# ---------------
# Any LightningModule will do, or a plain network.

import functools
import logging

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.data import DigitsDataModule
from lightning_ext.metrics import InfluenceScores, LOOCorrelation
from lightning_ext.modules import Classifier, InfluenceModule, PBRFModule
from lightning_ext.nn import MLP

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
torch.set_num_threads(1)


def trainer(epochs=1):
    return pl.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


digits = DigitsDataModule(binarize=False)
digits.setup()
train = TensorDataset(*(tensor[:500] for tensor in digits.train_set.tensors))
test = TensorDataset(*(tensor[:50] for tensor in digits.held_out_set.tensors))

pl.seed_everything(0, verbose=False)
model = Classifier(MLP([64, 16, 10]), functools.partial(torch.optim.Adam, lr=0.01))
trainer(20).fit(model, DataLoader(train, batch_size=50, shuffle=True))

# %%
# Score every training example against every question
# ---------------------------------------------------
# One call. A score is the rise of a test loss, in nats, if the training example were removed: positive means it helps.

influence = InfluenceModule(model, queries=DataLoader(test, batch_size=50), damping=0.01)
scores = InfluenceScores.gather(trainer().predict(influence, DataLoader(train, batch_size=100)))
print(scores.shape, influence.report)

# %%
# Check the answer against what it estimates
# ------------------------------------------
# Take twenty examples away, one at a time, and let the network respond while its other predictions stay near: twenty
# copies at once, in an ordinary fit. Influence puts them in order; of the largest effects it predicts too little.

removed = scores.abs().sum(0).topk(20).indices
response = PBRFModule(model, remove=removed, damping=0.01, optimizer="newton")
trainer(40).fit(response, DataLoader(train, batch_size=500))

check = LOOCorrelation("pearson")
check.update(predicted=scores[:, removed], actual=response.measure(DataLoader(test, batch_size=50)).T.cpu())
print("mean correlation over the questions:", round(check.compute()["correlation"].item(), 3))

figure, axes = check.plot(label="PBRF")
axes.set(xlabel="influence on the mean test loss (nats)", ylabel="proximal Bregman response (nats)")
plt.show()

# %%
# Other answers to the same question
# ----------------------------------
# Approximations are one word away, and the exact answer tells what they are worth.

for solver in ("ekfac", "kfac", "identity"):
    other = InfluenceModule(model, queries=DataLoader(test, batch_size=50), damping=0.01, solver=solver)
    agreement = torch.corrcoef(torch.stack([other.scores(DataLoader(train, batch_size=100)).ravel(), scores.ravel()]))
    print(f"{solver:9} correlation with the exact scores {agreement[0, 1]:.3f}")
