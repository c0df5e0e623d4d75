"""Pure array maths: spacing, resampling, cropping. Imports no other room."""
