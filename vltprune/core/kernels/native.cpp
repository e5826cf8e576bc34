// Attention with statistics of its map, and the small steps of one pruning decision, for packed tokens in float32 on CPUs.
//
// Each function computes what the Python function of the same name computes, in one call where PyTorch needs ten or more.
// Tensors are [total, ...]: the tokens of all instances end to end; `lengths` are the tokens of each instance. Python checks
// devices, shapes and dtypes of operands, and that no gradient is wanted. Only `attend` reads strides: of q, k and v.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

// the BLAS that PyTorch is linked with: C = alpha op(A) op(B) + beta C, stored by columns
extern "C" void sgemm_(
    const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha, const float* a,
    const int* lda, const float* b, const int* ldb, const float* beta, float* c, const int* ldc);

namespace {

using at::Tensor;
using Lengths = std::vector<int64_t>;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kRows = 64;  // most query rows of a tile: their probabilities of one head stay in the second-level cache
constexpr int64_t kFewRows = 16;

// C [rows, columns] = scale A B' of matrices stored by rows; B is [columns, inner], or [inner, columns] where `by_inner`
void multiply(
    int rows, int columns, int inner, float scale, const float* a, int step_a, const float* b, int step_b, bool by_inner,
    float* c, int step_c) {
  const float none = 0.0f;
  sgemm_(by_inner ? "N" : "T", "N", &columns, &rows, &inner, &scale, b, &step_b, a, &step_a, &none, c, &step_c);
}

std::vector<int64_t> starts_of(const Lengths& lengths) {
  std::vector<int64_t> starts(lengths.size() + 1, 0);
  std::partial_sum(lengths.begin(), lengths.end(), starts.begin() + 1);
  return starts;
}

// exp(x) for x <= 0, to 2 units in the last place: 2^k times a polynomial on the rest; compilers vectorize it
inline float exp_of(float x) {
  x = std::max(x, -87.0f);
  const float k = std::nearbyint(x * 1.44269504088896341f);
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// the largest of n numbers, by lanes: compilers do not vectorize the maximum of one float
inline float largest_of(const float* row, int64_t n) {
  constexpr int64_t kLanes = 16;
  float most[kLanes];
  std::fill_n(most, kLanes, -kInfinity);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) most[lane] = most[lane] > row[j + lane] ? most[lane] : row[j + lane];
  }
  float largest = *std::max_element(most, most + kLanes);
  for (int64_t j = whole; j < n; ++j) largest = std::max(largest, row[j]);
  return largest;
}

// softmax of the first `seen` of n logits, in place; the others get 0
inline void softmax_row(float* row, int64_t seen, int64_t n) {
  const float largest = largest_of(row, seen);
  // apart from the sum: compilers make one chain of both
#pragma omp simd
  for (int64_t j = 0; j < seen; ++j) row[j] = exp_of(row[j] - largest);
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < seen; ++j) total += row[j];
  const float factor = 1 / total;
#pragma omp simd
  for (int64_t j = 0; j < seen; ++j) row[j] *= factor;
  std::fill(row + seen, row + n, 0.0f);
}

inline void add_scaled(float* out, const float* row, float factor, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] += factor * row[j];
}

struct Wanted {
  bool received, column, diagonal, summary;
};

struct Statistics {
  Tensor received, column, diagonal, summary;
};

struct Tile {
  int64_t start, length, first, rows;  // of the instance; of the tile in it
};

// One tile of query rows of one instance: contexts of these queries, and what they add to the statistics of all its keys.
void attend_tile(
    const Tile& tile, const Tensor& q, const Tensor& k, const Tensor& v, float scale, const bool* apart,
    const float* key_bias, bool causal, const Wanted& wanted, float* out, float* received,
    float* column, float* diagonal, float* summary) {
  const int64_t heads = q.size(1), dim = q.size(2), n = tile.length, m = tile.rows;
  const int64_t row = tile.start + tile.first;
  std::vector<float> weights(m * n), best(wanted.received ? m * n : 0, 0.0f);
  for (int64_t h = 0; h < heads; ++h) {
    const float* queries = q.const_data_ptr<float>() + row * q.stride(0) + h * q.stride(1);
    const float* keys = k.const_data_ptr<float>() + tile.start * k.stride(0) + h * k.stride(1);
    const float* values = v.const_data_ptr<float>() + tile.start * v.stride(0) + h * v.stride(1);
    multiply(m, n, dim, scale, queries, q.stride(0), keys, k.stride(0), false, weights.data(), n);
    for (int64_t r = 0; r < m; ++r) {
      float* one = weights.data() + r * n;
      if (key_bias != nullptr) add_scaled(one, key_bias + tile.start, 1.0f, n);
      softmax_row(one, causal ? tile.first + r + 1 : n, n);
      if (wanted.column) add_scaled(column, one, 1.0f / heads, n);
      if (wanted.diagonal) diagonal[row + r] += one[tile.first + r] / heads;
    }
    if (wanted.received) {
#pragma omp simd
      for (int64_t j = 0; j < m * n; ++j) best[j] = best[j] > weights[j] ? best[j] : weights[j];
    }
    if (wanted.summary && tile.first == 0) {
      for (int64_t j = 0; j < n; ++j) summary[(tile.start + j) * heads + h] = weights[j];
    }
    multiply(m, dim, n, 1.0f, weights.data(), n, values, v.stride(0), true, out + (row * heads + h) * dim, heads * dim);
  }
  for (int64_t r = 0; wanted.received && r < m; ++r) {
    if (!apart[row + r]) add_scaled(received, best.data() + r * n, 1.0f, n);
  }
}

// core/attention_stats.py: context [total, heads, head_dim], RECEIVED, COLUMN, DIAGONAL [total], SUMMARY [total, heads]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const Lengths& lengths, double scale,
    const std::optional<Tensor>& apart, const std::optional<Tensor>& key_bias, bool causal, bool wants_received, bool wants_column, bool wants_diagonal, bool wants_summary) {
  const int64_t total = q.size(0), heads = q.size(1);
  const Wanted wanted{wants_received, wants_column, wants_diagonal, wants_summary};
  const auto starts = starts_of(lengths);
  const int64_t share = (total + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t rows = std::clamp(share, kFewRows, kRows);
  std::vector<Tile> tiles;
  for (size_t i = 0; i < lengths.size(); ++i) {
    for (int64_t first = 0; first < lengths[i]; first += rows) {
      tiles.push_back({starts[i], lengths[i], first, std::min(rows, lengths[i] - first)});
    }
  }
  std::vector<int64_t> places(tiles.size() + 1, 0);  // where a tile's sums over its queries begin
  for (size_t t = 0; t < tiles.size(); ++t) places[t + 1] = places[t] + tiles[t].length;

  Tensor out = at::empty({total, heads, q.size(2)}, q.options());
  auto zeros = [&](bool is_wanted, at::IntArrayRef shape) {
    return is_wanted ? at::zeros(shape, q.options()) : at::empty({0}, q.options());
  };
  Statistics found{
      zeros(wanted.received, {total}), zeros(wanted.column, {total}), zeros(wanted.diagonal, {total}),
      zeros(wanted.summary, {total, heads})};
  Tensor received = zeros(wanted.received, {places.back()}), column = zeros(wanted.column, {places.back()});
  const Tensor mask = apart ? apart->contiguous() : Tensor();
  const Tensor bias = key_bias ? key_bias->to(at::kFloat).contiguous() : Tensor();
  const bool* apart_data = apart ? mask.const_data_ptr<bool>() : nullptr;
  const float* bias_data = key_bias ? bias.const_data_ptr<float>() : nullptr;
  float *out_data = out.data_ptr<float>(), *received_data = received.data_ptr<float>();
  float *column_data = column.data_ptr<float>(), *diagonal_data = found.diagonal.data_ptr<float>();
  float* summary_data = found.summary.data_ptr<float>();

  at::parallel_for(0, static_cast<int64_t>(tiles.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      attend_tile(
          tiles[t], q, k, v, static_cast<float>(scale), apart_data, bias_data, causal, wanted, out_data,
          received_data + (wanted.received ? places[t] : 0), column_data + (wanted.column ? places[t] : 0),
          diagonal_data, summary_data);
    }
  });
  float *received_sum = found.received.data_ptr<float>(), *column_sum = found.column.data_ptr<float>();
  for (size_t t = 0; t < tiles.size(); ++t) {
    if (wanted.received) add_scaled(received_sum + tiles[t].start, received_data + places[t], 1.0f, tiles[t].length);
    if (wanted.column) add_scaled(column_sum + tiles[t].start, column_data + places[t], 1.0f, tiles[t].length);
  }
  return {out, found.received, found.column, found.diagonal, found.summary};
}

// layers/scorers/base.py, `normalize`. None where scores must be lifted first.
std::optional<Tensor> normalize(const Tensor& given_scores, const Tensor& given_apart, const Lengths& lengths, bool are_shares) {
  const Tensor scores = given_scores.contiguous(), apart = given_apart.contiguous();
  Tensor out = at::empty_like(scores);
  const float* z = scores.const_data_ptr<float>();
  const bool* hides = apart.const_data_ptr<bool>();
  float* normalized = out.data_ptr<float>();
  int64_t start = 0;
  for (const int64_t n : lengths) {
    double total = 0, size = 0;
    for (int64_t j = start; j < start + n; ++j) {
      if (hides[j]) continue;
      total += z[j];
      size += std::abs(z[j]);
    }
    if (!are_shares && total <= size * 1e-6) return std::nullopt;
    const float factor = static_cast<float>(std::max(total, 1e-8));
#pragma omp simd
    for (int64_t j = start; j < start + n; ++j) normalized[j] = z[j] / factor;
    start += n;
  }
  return out;
}

// core/precision.py, `rank`: scores [batch, n] and their slots from the largest score to the smallest
std::tuple<Tensor, Tensor> rank(const Tensor& given_rows, double within) {
  const Tensor rows = given_rows.contiguous();
  const int64_t batch = rows.size(0), n = rows.size(1);
  Tensor ranked = rows, order = at::empty({batch, n}, rows.options().dtype(at::kLong));
  const float tolerance = static_cast<float>(within);
  for (int64_t i = 0; i < batch; ++i) {
    const float* keys = rows.const_data_ptr<float>() + i * n;
    int64_t* slot = order.data_ptr<int64_t>() + i * n;
    std::iota(slot, slot + n, 0);
    // PyTorch sorts NaN before all numbers
    auto before = [&](int64_t a, int64_t b) {
      return std::isnan(keys[a]) ? !std::isnan(keys[b]) : keys[a] > keys[b];
    };
    std::stable_sort(slot, slot + n, before);
    auto is_near = [&](int64_t j) {
      const float above = keys[slot[j - 1]], below = keys[slot[j]];
      return above > below && above - below < std::max(above, -below) * tolerance;
    };
    bool is_apart = true;
    for (int64_t j = 1; j < n && is_apart; ++j) is_apart = !is_near(j);
    if (is_apart) continue;
    if (ranked.is_same(rows)) ranked = rows.clone();
    float* equalized = ranked.data_ptr<float>() + i * n;
    for (int64_t first = 0, next = 1; first < n; first = next++) {
      while (next < n && (keys[slot[next - 1]] == keys[slot[next]] || is_near(next))) ++next;
      const float leader = keys[slot[first]];
      for (int64_t j = first; j < next; ++j) equalized[slot[j]] = leader;
      std::sort(slot + first, slot + next);
    }
  }
  return {ranked, order};
}

// layers/keepers/adaptive.py, the number of tokens of each instance above the smallest of the anchors' mean scores
std::vector<int64_t> above_anchors(
    const Tensor& given_affinity, const Tensor& given_scores, const Tensor& given_apart, const Lengths& lengths,
    double temperature, double tie) {
  const Tensor affinity = given_affinity.contiguous(), scores = given_scores.contiguous();
  const Tensor apart = given_apart.contiguous();
  const int64_t anchors = affinity.size(1);
  const float inverse = static_cast<float>(1 / temperature);
  std::vector<int64_t> counts;
  int64_t start = 0;
  for (const int64_t n : lengths) {
    const float* score = scores.const_data_ptr<float>() + start;
    const bool* hides = apart.const_data_ptr<bool>() + start;
    const float* rows = affinity.const_data_ptr<float>() + start * anchors;
    std::vector<float> largest(anchors, -kInfinity), total(anchors, 0.0f), sum(anchors, 0.0f), rest(anchors, 0.0f);
    for (int64_t j = 0; j < n; ++j) {
      if (hides[j]) continue;
      const float* row = rows + j * anchors;
#pragma omp simd
      for (int64_t a = 0; a < anchors; ++a) largest[a] = std::max(largest[a], row[a] * inverse);
    }
    std::vector<float> weight(n * anchors, 0.0f);
    for (int64_t j = 0; j < n; ++j) {
      if (hides[j]) continue;
      const float* row = rows + j * anchors;
      float* own = weight.data() + j * anchors;
#pragma omp simd
      for (int64_t a = 0; a < anchors; ++a) {
        own[a] = exp_of(row[a] * inverse - largest[a]);
        total[a] += own[a];
        sum[a] += own[a] * score[j];
      }
    }
    float near = kInfinity, beyond = kInfinity;
    for (int64_t a = 0; a < anchors; ++a) near = std::min(near, sum[a] / total[a]);
    for (int64_t j = 0; j < n; ++j) {
      if (!hides[j]) add_scaled(rest.data(), weight.data() + j * anchors, score[j] - near, anchors);
    }
    for (int64_t a = 0; a < anchors; ++a) beyond = std::min(beyond, rest[a] / total[a]);
    int64_t above = 0;
    for (int64_t j = 0; j < n; ++j) {
      above += !hides[j] && score[j] - near > beyond + std::abs(near) * static_cast<float>(tie);
    }
    counts.push_back(above);
    start += n;
  }
  return counts;
}

// layers/reducers/base.py, `Fuse._weight` for normalized weights, and layers/reducers/reduction.py, `plan_fusion`: the weights
// [total], the rows that stay or are sums, the number of each [total], the rows of the sums, their instances, the new lengths
std::tuple<Tensor, Tensor, Tensor, Tensor, Lengths, Lengths> plan_fusion(
    const Tensor& given_scores, const Tensor& given_keep, const Lengths& lengths, bool normalized) {
  const Tensor scores = given_scores.contiguous(), keep = given_keep.contiguous();
  const int64_t total = scores.size(0);
  const auto whole = scores.options().dtype(at::kLong);
  Tensor weight = at::zeros_like(scores), number = at::empty({total}, whole);
  const float* score = scores.const_data_ptr<float>();
  const bool* stays = keep.const_data_ptr<bool>();
  float* share = weight.data_ptr<float>();
  int64_t* numbers = number.data_ptr<int64_t>();
  std::vector<int64_t> index, result;
  Lengths instances, after;
  index.reserve(total);
  int64_t start = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const int64_t end = start + lengths[i], before = index.size();
    int64_t last = -1, lost = 0;
    double sum = 0, size = 0;
    for (int64_t j = start; j < end; ++j) {
      if (stays[j]) continue;
      last = j, ++lost, sum += score[j], size += std::abs(score[j]);
    }
    const bool is_usable = !normalized || sum > std::max(size * 1e-3, 1e-5);
    const float factor = normalized ? static_cast<float>(std::max(sum, 1e-8)) : 1.0f;
    for (int64_t j = start; j < end; ++j) {
      if (!stays[j]) share[j] = is_usable ? score[j] / factor : 1.0f / lost;
      if (stays[j] || j == last) index.push_back(j);
      numbers[j] = static_cast<int64_t>(index.size()) - 1;
    }
    if (lost) {
      result.push_back(numbers[last]);
      instances.push_back(i);
    }
    after.push_back(static_cast<int64_t>(index.size()) - before);
    start = end;
  }
  return {weight, at::tensor(index, whole), number, at::tensor(result, whole), instances, after};
}

template <typename T>
void place_sums(
    const T* values, const T* share, const bool* goes, const int64_t* index, int64_t rows, int64_t width,
    const std::vector<int64_t>& starts, const std::vector<int64_t>& sum_rows, const Lengths& instances, T* out) {
  at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) std::copy_n(values + index[r] * width, width, out + r * width);
  });
  at::parallel_for(0, static_cast<int64_t>(sum_rows.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      T* sum = out + sum_rows[s] * width;
      std::fill_n(sum, width, T(0));
      for (int64_t j = starts[instances[s]]; j < starts[instances[s] + 1]; ++j) {
        if (!goes[j]) continue;
        const T factor = share == nullptr ? T(1) : share[j];
        const T* row = values + j * width;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) sum[c] += factor * row[c];
      }
    }
  });
}

// layers/reducers/reduction.py, `FusedSums.contents`, and `counted` without weights: values [total, ...] -> [new total, ...]
Tensor fuse(
    const Tensor& given_values, const std::optional<Tensor>& given_share, const Tensor& given_goes, const Tensor& index,
    const Tensor& result, const Lengths& instances, const Lengths& lengths) {
  const Tensor values = given_values.contiguous(), goes = given_goes.contiguous();
  const Tensor share = given_share ? given_share->contiguous() : Tensor();
  auto shape = values.sizes().vec();
  shape[0] = index.size(0);
  const int64_t width = values.size(0) ? values.numel() / values.size(0) : 1;
  const auto starts = starts_of(lengths);
  const int64_t* rows = result.const_data_ptr<int64_t>();
  const std::vector<int64_t> sum_rows(rows, rows + result.size(0));
  Tensor out = at::empty(shape, values.options());
  auto run = [&](auto zero) {
    using T = decltype(zero);
    place_sums<T>(
        values.const_data_ptr<T>(), given_share ? share.const_data_ptr<T>() : nullptr, goes.const_data_ptr<bool>(),
        index.const_data_ptr<int64_t>(), index.size(0), width, starts, sum_rows, instances, out.data_ptr<T>());
  };
  if (values.scalar_type() == at::kLong) {
    run(int64_t(0));
  } else {
    run(0.0f);
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  m.def(
      "attend", &attend, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("lengths"), py::arg("scale"), py::kw_only(),
      py::arg("apart") = py::none(), py::arg("key_bias") = py::none(), py::arg("causal") = false,
      py::arg("received") = false, py::arg("column") = false, py::arg("diagonal") = false, py::arg("summary") = false,
      py::call_guard<py::gil_scoped_release>());
  m.def("normalize", &normalize);
  m.def("rank", &rank);
  m.def("above_anchors", &above_anchors);
  m.def("plan_fusion", &plan_fusion);
  m.def("fuse", &fuse, py::call_guard<py::gil_scoped_release>());
}
