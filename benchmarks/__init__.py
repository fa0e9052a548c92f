"""The benchmark: this template's service beside others, in one run. See README.md."""
