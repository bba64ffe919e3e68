"""Evidence without a GPU: compilation for every architecture, PEFT's features, the judge of a serving benchmark."""
