"""How the bundled models were made: data, classifier, VAE and transformer training, each resumable. Nothing else imports this."""
