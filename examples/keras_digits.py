"""A small convolutional network learns handwritten digits, with FreezeOut, in Keras.

    pip install 'freezeout[keras]' jax scikit-learn
    KERAS_BACKEND=jax python examples/keras_digits.py

KERAS_BACKEND may also be tensorflow or torch.
"""

import keras
from keras import layers
from sklearn.datasets import load_digits

from freezeout.integrations.keras import FreezeOutCallback

EPOCHS, BATCH = 10, 64


def new_model() -> keras.Model:
    model = keras.Sequential([layers.Input((8, 8, 1))])
    for width, stride in ((16, 1), (32, 1), (32, 2), (64, 1)):
        model.add(layers.Conv2D(width, 3, stride, padding="same", use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.9))
        model.add(layers.ReLU())
    model.add(layers.Flatten())
    model.add(layers.Dense(10))
    return model


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
    x, y, test_x, test_y = images[:1408], labels[:1408], images[1408:], labels[1408:]
    keras.utils.set_random_seed(0)
    model = new_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(3e-3), loss=loss, metrics=["accuracy"])

    freezer = FreezeOutCallback()
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=2, callbacks=[freezer])

    print("frozen after each epoch:", *model.history.history["num_frozen"])
    _, accuracy = model.evaluate(test_x, test_y, verbose=0)
    print(f"test error {1 - accuracy:.2%}; {freezer.num_frozen} of 5 layers were frozen")


if __name__ == "__main__":
    main()
