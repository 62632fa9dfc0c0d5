"""The paper's experiments: models, data, training runs, sweeps and reports (extra: `lab`)."""
