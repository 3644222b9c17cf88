"""The app that Flower starts by `flwr run .`: Savepoint's server and clients, with this project's
classes. Nothing else imports this module, as Flower is optional.
"""

from savepoint.federated import client_app, server_app

server = server_app.app
client = client_app.app
