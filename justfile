# The steps of `.ci/run`, one recipe each. `just` alone runs the whole gate; `.ci/run` does the same without `just`.

# Run every step in order
all:
    .ci/run

# Check the formatting
fmt:
    .ci/run fmt

# Run clippy on the whole workspace, warnings denied
lint:
    .ci/run lint

# Run the README's test command
test:
    .ci/run test

# Test the other packages of the workspace
workspace:
    .ci/run workspace

# Check each feature alone
features:
    .ci/run features

# Test each adapter with its own feature
adapters:
    .ci/run adapters

# Run a program with `panic = "abort"` on missing and shut-down runtimes
abort:
    .ci/run abort

# Build the documentation, warnings denied
docs:
    .ci/run docs

# Model-check the refresh engine with loom
loom:
    .ci/run loom

# Run every example against the simulator
examples:
    .ci/run examples

# Run the benches briefly, without optimization
bench-smoke:
    .ci/run bench-smoke

# Compare instructions per request with the record
instructions:
    .ci/run instructions
