"""Trains the sample wine model and publishes it as the next version.

    python -m training.wine

The data are the 178 analyses of the UCI wine recognition set, which ship with scikit-learn.
"""

from pathlib import Path

import joblib
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from app.artifacts import new_version
from app.reference import describe
from app.settings import load_settings
from predictors.wine import Features, Predictor

MODEL = Path(__file__).stem


def make_model() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def main() -> None:
    # The columns are named as in the UCI set; Features has them in the same order.
    rows, cultivars = load_wine(return_X_y=True)
    accuracy = float(cross_val_score(make_model(), rows, cultivars, cv=5).mean())
    model = make_model().fit(rows, cultivars)

    with new_version(
        load_settings().artifacts_dir,
        MODEL,
        input_schema=Features.model_json_schema(),
        trained_with=["scikit-learn", "joblib", "numpy"],
        metrics={"accuracy": round(accuracy, 4)},
    ) as directory:
        joblib.dump(model, directory / "model.joblib")
        # What the service will be measured against, to see when wines are no longer like these.
        names = list(Features.model_fields)
        sample = [Features(**dict(zip(names, row, strict=True))) for row in rows.tolist()]
        describe(directory, Predictor, sample)
    print(f"{MODEL}: accuracy {accuracy:.3f} in 5-fold cross-validation.")


if __name__ == "__main__":
    main()
