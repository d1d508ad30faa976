"""Where parameters live, and how a module is put back as it was."""
