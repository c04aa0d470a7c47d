"""The attention cores of MLA: one signature, several backends, chosen in `dispatch`."""
