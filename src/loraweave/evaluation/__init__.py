"""Reading test data, generating answers, scoring them, and the numbers behind a comparison of methods."""
