"""How the bundled model was made: data, classifier, VAE and DiT training, each resumable. Nothing else imports this."""
