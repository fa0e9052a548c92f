"""The service around the predictors: edit predictors/, leave app/ to `cruft update`."""
