"""The program: a config becomes objects (`build`), and a verb of the command line is one file."""
