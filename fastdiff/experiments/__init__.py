"""The paper's experiments at equal, small budgets on the embedded scenes."""
