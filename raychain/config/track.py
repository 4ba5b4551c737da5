"""Experiment trackers, as a user names them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from raychain.schema.component import Component


def _tracking_uri(uri: str) -> str:
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise ValueError("allowed is a server or a data base: http://…, sqlite:///mlflow.db (MLflow gave up folders)")
    return uri


TrackingUri = Annotated[str, AfterValidator(_tracking_uri)]


class Track(Component):
    """Experiment trackers that get the curves too; TensorBoard files are always written."""

    wandb: Annotated[str, Field(pattern=r"^([^/]+/)?[^/]+$")] | None = None
    """Weights & Biases project, or TEAM/PROJECT (needs raychain[wandb]). WANDB_MODE and W&B's other variables count."""
    mlflow: TrackingUri | None = None
    """MLflow tracking URI (needs raychain[mlflow]): http://…, sqlite:///mlflow.db, databricks. run.json shows it:
    passwords belong in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
