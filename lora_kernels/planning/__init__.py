"""Which plan an operator runs for its shape and chip: cost model, plans, measured tables, tuning."""
