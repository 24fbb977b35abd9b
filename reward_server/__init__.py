"""Defines and serves rewards: analytic functions, a user's own function, the Ray Serve app."""
