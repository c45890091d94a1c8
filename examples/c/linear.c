/* One linear layer straight from the mapped weights of a bundle, with the numbers that PyTorch gives.
 *
 *     cc -std=c99 -O2 -Wall -Wextra -Werror -I tiny-bundle examples/c/linear.c -o linear
 *     ./linear tiny-bundle dit.blocks.0.ffn.0 rows.f32 result.f32
 *
 * rows.f32: float32 numbers, whole rows of the layer's input width; result.f32: as many rows of its output width.
 * F32 and BF16 weights: the sum is rounded once, to the dtype of the weights. FP8 weights: each row is quantised to
 * e4m3 with a scale of its own, as Kinora does it, and the result rounded to BF16.
 */
#define KINORA_BUNDLE_IMPLEMENTATION
#include "kinora_bundle.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define E4M3_MAX 448.0f
#define AMAX_FLOOR 1e-12f

static float to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return value; /* NaN */
    bits += 0x7FFFu + (bits >> 16 & 1u);                  /* to nearest, ties to even */
    return kinora_from_bf16((uint16_t)(bits >> 16));
}

/* The e4m3 number nearest to a value in [-448, 448], ties to even. */
static float to_e4m3(float value) {
    float size = value < 0.0f ? -value : value, result;
    if (size < 0.015625f) { /* below 2^-6: steps of 2^-9 */
        uint32_t steps = (uint32_t)(size * 512.0f);
        float rest = size * 512.0f - (float)steps;
        if (rest > 0.5f || (rest == 0.5f && (steps & 1u))) steps++;
        result = kinora_from_f8_e4m3((uint8_t)steps);
    } else {
        uint32_t bits;
        memcpy(&bits, &size, sizeof bits);
        bits += 0x7FFFFu + (bits >> 20 & 1u);
        result = kinora_from_f8_e4m3((uint8_t)((bits >> 20) - (120u << 3)));
    }
    return value < 0.0f ? -result : result;
}

/* Number `index` of a tensor, without its scale. */
static float number_at(const kinora_tensor *tensor, uint64_t index) {
    switch (tensor->dtype) {
    case KINORA_F32:
        return ((const float *)tensor->data)[index];
    case KINORA_BF16:
        return kinora_from_bf16(((const uint16_t *)tensor->data)[index]);
    case KINORA_F8_E4M3:
        return kinora_from_f8_e4m3(((const uint8_t *)tensor->data)[index]);
    default:
        return 0.0f; /* `find_layer` lets no other dtype through */
    }
}

static int find_layer(const kinora_bundle *bundle, const char *layer, kinora_tensor *weight, kinora_tensor *bias,
                      kinora_error *error) {
    char name[512];
    if (snprintf(name, sizeof name, "%s.weight", layer) >= (int)sizeof name) return 0;
    if (kinora_bundle_find(bundle, name, weight, error) != KINORA_OK) return 0;
    snprintf(name, sizeof name, "%s.bias", layer);
    if (kinora_bundle_find(bundle, name, bias, error) != KINORA_OK) return 0;
    snprintf(error->message, sizeof error->message, "%.200s is no linear layer in F32, BF16 or FP8", layer);
    if (weight->rank != 2 || bias->rank != 1 || bias->shape[0] != weight->shape[0] || !weight->count) return 0;
    if (bias->dtype != KINORA_F32 && bias->dtype != KINORA_BF16) return 0;
    if (weight->dtype == KINORA_F8_E4M3) return weight->scale != NULL;
    return weight->dtype == KINORA_F32 || weight->dtype == KINORA_BF16;
}

/* One row x [K] -> y [N]; x is changed to what the layer reads. */
static void linear_row(const kinora_tensor *weight, const kinora_tensor *bias, float *x, float *y) {
    const uint64_t rows = weight->shape[0], width = weight->shape[1];
    const int fp8 = weight->dtype == KINORA_F8_E4M3, half = weight->dtype != KINORA_F32;
    float descale = 1.0f;
    uint64_t n, k;
    if (half)
        for (k = 0; k < width; k++) x[k] = to_bf16(x[k]);
    if (fp8) {
        float largest = AMAX_FLOOR, scale;
        for (k = 0; k < width; k++) {
            float size = x[k] < 0.0f ? -x[k] : x[k];
            if (size > largest) largest = size;
        }
        scale = E4M3_MAX / largest;
        for (k = 0; k < width; k++) {
            float scaled = x[k] * scale;
            if (scaled > E4M3_MAX) scaled = E4M3_MAX;
            if (scaled < -E4M3_MAX) scaled = -E4M3_MAX;
            x[k] = to_e4m3(scaled);
        }
        descale = 1.0f / scale;
    }
    for (n = 0; n < rows; n++) {
        double sum = 0.0;
        for (k = 0; k < width; k++) sum += (double)x[k] * (double)number_at(weight, n * weight->strides[0] + k);
        if (fp8) sum *= (double)descale * (double)weight->scale[weight->scale_count == 1 ? 0 : n];
        sum += (double)number_at(bias, n);
        y[n] = half ? to_bf16((float)sum) : (float)sum;
    }
}

int main(int argc, char **argv) {
    kinora_error error;
    kinora_tensor weight, bias;
    kinora_bundle *bundle;
    FILE *input, *output;
    float *x, *y;
    int status = 1;

    if (argc != 5) {
        fprintf(stderr, "usage: linear BUNDLE LAYER ROWS.f32 RESULT.f32\n");
        return 2;
    }
    bundle = kinora_bundle_open(argv[1], &error);
    if (!bundle || !find_layer(bundle, argv[2], &weight, &bias, &error)) {
        fprintf(stderr, "linear: %s\n", error.message);
        kinora_bundle_close(bundle);
        return 1;
    }
    x = (float *)malloc((size_t)weight.shape[1] * sizeof *x);
    y = (float *)malloc((size_t)weight.shape[0] * sizeof *y);
    input = fopen(argv[3], "rb");
    output = fopen(argv[4], "wb");
    if (x && y && input && output) {
        status = 0;
        while (fread(x, sizeof *x, (size_t)weight.shape[1], input) == weight.shape[1]) {
            linear_row(&weight, &bias, x, y);
            if (fwrite(y, sizeof *y, (size_t)weight.shape[0], output) != weight.shape[0]) status = 1;
        }
    }
    if (input) fclose(input);
    if (output && fclose(output) != 0) status = 1;
    if (status) fprintf(stderr, "linear: %s cannot be read, or %s cannot be written\n", argv[3], argv[4]);
    free(x);
    free(y);
    kinora_bundle_close(bundle);
    return status;
}
