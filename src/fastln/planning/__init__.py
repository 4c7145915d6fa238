"""`fastln plan`: what a training run will take, before it is launched. Everything here is predicted, on meta."""
