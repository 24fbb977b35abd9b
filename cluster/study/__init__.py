"""The paper's studies: grids of runs through the real system, figures, and claims decided."""
