// Softmax attention for CPUs, forward and backward; fastln_kernels.reference_attention defines it. It processes one
// block of queries with one block of keys at a time, and a thread holds the scores of only one such block. Matrix
// products use torch's function for blocks in the cache (products.h), which sums in float32. Everything between them is
// fused here. A thread takes one head, or in the backward one head of keys with its group of query heads. Each works in
// a fixed order, so the result does not depend on the number of threads.

#include "attention_forward.h"

namespace fastln {
namespace {

struct GradientRoundings {
  HeadRounding dq, dk, dv;
};

// One head of keys and values, with the query heads that use it.
template <class T, class C, class R>
class Gradients {
 public:
  Gradients(const Arguments& arguments, const Dropout& dropout, int64_t batch, int64_t kv_head)
      : a_(arguments), dropout_(dropout), batch_(batch), kv_head_(kv_head) {}

  void run(GradientRoundings& roundings) {
    const bool need_ds = a_.dq.data || a_.dk.data;
    C* keys = space_.keys.at_least(block_keys_ * dim_);
    float *dk = space_.dk.at_least(block_keys_ * dim_), *dv = space_.dv.at_least(block_keys_ * v_dim_);
    const auto rows = [&](const Rows& tensor, int64_t row) { return tensor.at<const T>(batch_, kv_head_, row); };
    scores_.resize(group_ * padded_queries_, block_keys_, block_keys_, a_.dim, dim_);
    slopes_.resize(group_ * padded_queries_, block_keys_, block_keys_, a_.v_dim, v_dim_);
    scores_.centre(rows(a_.k, 0), a_.k.row, a_.keys);
    if (need_ds) slopes_.centre(rows(a_.v, 0), a_.v.row, a_.keys);
    read_queries();
    for (int64_t first = 0; first < a_.keys; first += block_keys_) {
      const int64_t n_keys = std::min(block_keys_, a_.keys - first);
      if (need_ds) slopes_.put_right(rows(a_.v, first), a_.v.row, n_keys, 0);
      scores_.put_right(rows(a_.k, first), a_.k.row, n_keys, 0);
      // The rows of dS sum to 0, so that dq does not depend on the keys' mean; without it, rounding counts less.
      if (a_.dq.data) scores_.pair_right(rows(a_.k, first), a_.k.row, n_keys, keys);
      // The first block of queries writes all columns, unless the mask is causal.
      if (a_.causal) {
        std::fill_n(dk, block_keys_ * dim_, 0.0f);
        std::fill_n(dv, block_keys_ * v_dim_, 0.0f);
      }
      for (int64_t g = 0; g < group_; g++) {
        for (int64_t query = a_.causal ? first / QUERIES * QUERIES : 0; query < a_.queries; query += QUERIES)
          block(g, query, first, keys, dk, dv);
      }
      const auto write = [&](const float* sum, int64_t n_cols, float factor, const Rows& to) {
        store_transposed(sum, block_keys_, n_keys, n_cols, factor, to.at<T>(batch_, kv_head_, first), to.row);
      };
      if (a_.dk.data) write(dk, a_.dim, static_cast<float>(a_.scale), a_.dk);
      if (a_.dv.data) write(dv, a_.v_dim, dropout_.scale(), a_.dv);
      roundings.dk.wrote<T>(batch_, first);
      roundings.dv.wrote<T>(batch_, first);
    }
    for (int64_t first = 0; first < a_.queries && a_.dq.data; first += QUERIES) {
      for (int64_t g = 0; g < group_; g++) write_dq(g, first);
      roundings.dq.wrote<T>(batch_, first);
    }
    release<C>();
  }

 private:
  // Reads the queries and the gradient of the output once, into the layouts that the blocks need.
  void read_queries() {
    const int64_t n_rows = group_ * padded_queries_, widest = std::max(dim_, v_dim_);
    C *rows = space_.rows.at_least(QUERIES * widest), *pairs = space_.pairs.at_least(PAIRED<C> ? QUERIES * widest : 0);
    const auto transpose = [&](const T* from, int64_t stride, int64_t n_queries, int64_t n_cols, int64_t ld, C* to) {
      if constexpr (PAIRED<C>) {
        copy_rows(from, stride, n_queries, n_cols, rows, ld);
        transpose_to_pairs(rows, n_queries, ld, pairs, QUERIES);
        split_pairs(pairs, QUERIES, ld, padded(n_queries), to);
      } else {
        transpose_rows(from, stride, n_queries, n_cols, ld, rows, to, QUERIES);
      }
    };
    q_t_ = space_.q.at_least(n_rows * dim_);
    dout_t_ = space_.dout.at_least(n_rows * v_dim_);
    dq_ = space_.dq.at_least(n_rows * dim_);
    delta_ = space_.delta.at_least(n_rows);
    shift_ = space_.shift.at_least(n_rows);
    std::fill_n(delta_, n_rows, 0.0f);
    std::fill_n(shift_, n_rows, 0.0f);
    for (int64_t g = 0; g < group_; g++) {
      const int64_t head = kv_head_ * group_ + g;
      for (int64_t query = 0; query < a_.queries; query += QUERIES) {
        const int64_t n_queries = std::min(QUERIES, a_.queries - query), row = g * padded_queries_ + query;
        const T *q = a_.q.at<const T>(batch_, head, query), *dout = a_.dout.at<const T>(batch_, head, query);
        scores_.put_left(q, a_.q.row, n_queries, row);
        if (a_.dk.data) transpose(q, a_.q.row, n_queries, a_.dim, dim_, q_t_ + row * dim_);
        if (a_.dv.data) transpose(dout, a_.dout.row, n_queries, a_.v_dim, v_dim_, dout_t_ + row * v_dim_);
        if (!a_.dq.data && !a_.dk.data) continue;
        slopes_.put_left(dout, a_.dout.row, n_queries, row);
        const T* out = a_.out.at<const T>(batch_, head, query);
        for (int64_t r = row; r < row + n_queries; r++, out += a_.out.row) {
          prefetch_row(out + AHEAD * a_.out.row, a_.v_dim);
          const LeftProducts sums = slopes_.products_with(r, out);
          delta_[r] = sums.with_row, shift_[r] = sums.with_mean;
        }
      }
    }
  }

  // Adds the contribution of one block of queries and one block of keys to the gradients.
  void block(int64_t g, int64_t query, int64_t first, const C* keys, float* dk, float* dv) {
    const int64_t size = QUERIES * block_keys_;
    float *scores = space_.scores.at_least(size), *dp = space_.dp.at_least(size);
    C *p = in_place(scores, space_.p, size), *ds = in_place(dp, space_.ds, size);
    C* ds_pairs = PAIRED<C> ? space_.ds_pairs.at_least(size) : ds;
    const Head<T, C, R> head(a_, dropout_, batch_, kv_head_ * group_ + g);
    const int64_t n_queries = std::min(QUERIES, a_.queries - query), n_rows = padded(n_queries);
    const int64_t n_cols = padded(head.visible(query, n_queries, first)), row = g * padded_queries_ + query;
    if (!n_cols) return;
    const bool need_ds = a_.dq.data || a_.dk.data, add = a_.causal || row;  // to the sums over queries
    scores_.multiply(n_rows, n_cols, row, 0, scores);
    if (need_ds) slopes_.multiply(n_rows, n_cols, row, 0, dp);
    const auto rows = [&](auto drops) {
      this->rows(drops, head, row, query, first, n_rows, n_cols, scores, dp, p, ds, ds_pairs);
    };
    dropout_.active() ? rows(std::true_type{}) : rows(std::false_type{});
    if (a_.dv.data)
      multiply(padded(a_.v_dim), n_cols, n_rows, dout_t_ + row * v_dim_, QUERIES, p, block_keys_, dv, block_keys_,
               add);
    if (a_.dk.data)
      multiply(padded(a_.dim), n_cols, n_rows, q_t_ + row * dim_, QUERIES, ds_pairs, block_keys_, dk, block_keys_,
               add);
    if (a_.dq.data)
      multiply(n_rows, padded(a_.dim), n_cols, ds, block_keys_, keys, dim_, dq_ + row * dim_, dim_, first > 0);
  }

  // A row of a block.
  struct Line {
    typename Head<T, C, R>::Row row;
    float *scores, lse, factor, shift, delta;
    const float* dp;
    C* ds;
    const uint16_t* numbers;
    bool finished;  // whether `scores` are scores, and not products
  };

  struct PAndSlope {
    Float p, slope;
  };

  // Computes P and dS from the products of a block, two rows at a time.
  template <class Drops>
  void rows(Drops, const Head<T, C, R>& head, int64_t first_row, int64_t query, int64_t first, int64_t n_rows,
            int64_t n_cols, float* scores, const float* dp, C* p, C* ds, C* ds_pairs) const {
    const bool need_ds = a_.dq.data || a_.dk.data, need_dv = a_.dv.data, need_dk = a_.dk.data;
    const float* lse = a_.lse + (batch_ * a_.heads + head.number()) * a_.queries;
    const int64_t ld = block_keys_;
    const Dropout dropout = dropout_;
    const auto score_values = scores_.values(0);
    const auto slope_values = slopes_.values(0);
    const auto line_of = [&](int64_t r, int place) {
      const int64_t row = first_row + r;
      Line line{head.row(scores_, row, query + r, first, n_cols, place), scores + r * ld, 0, 0, 0, 0, dp + r * ld,
                ds + r * ld, nullptr, false};
      if (Drops::value) line.numbers = head.numbers(query + r, first, n_cols, place);
      if (query + r >= a_.queries) return line;
      line.lse = lse[query + r];
      if (need_ds) line.factor = slopes_.factor(row), line.shift = shift_[row], line.delta = delta_[row];
      if (is_dead_row(line.lse)) {
        head.finish_row(line.row, score_values, line.scores, n_cols);
        line.lse = revive(line.scores, n_cols, line.lse);
        line.finished = true;
      }
      return line;
    };
    const auto values = [&](const Line& line, int64_t column) __attribute__((always_inline)) {
      const Float score = line.finished ? load(line.scores + column, AllLanes{})
                                        : line.row.score(score_values, line.scores, column);
      const Float p = exponential_for(score - line.lse, T{});
      PAndSlope result{Drops::value ? dropout.keep(p, line.numbers + column) : p, Float{}};
      if (!need_ds) return result;
      Float dp;
      if constexpr (std::is_same_v<R, int8_t>)
        dp = slope_values(line.dp, column, line.factor) + line.shift;
      else
        dp = load(line.dp + column, AllLanes{});
      if constexpr (Drops::value)
        result.slope = result.p * dropout.scale() * dp - p * line.delta;
      else
        result.slope = p * (dp - line.delta);
      store(line.ds + column, result.slope, AllLanes{});
      return result;
    };
    for (int64_t r = 0; r < n_rows; r += 2) {
      const Line even = line_of(r, 0), odd = line_of(r + 1, 1);
      C *pairs = pair_at(p, ld, r / 2, 0), *slope_pairs = pair_at(ds_pairs, ld, r / 2, 0);
      for (int64_t column = 0; column < n_cols; column += LANES) {
        const PAndSlope above = values(even, column), below = values(odd, column);
        if (need_dv) store_pair(pair_at(pairs, ld, 0, column), ld, above.p, below.p);
        if (PAIRED<C> && need_dk) store_pair(pair_at(slope_pairs, ld, 0, column), ld, above.slope, below.slope);
      }
    }
  }

  struct Space {
    Buffer<C> keys, rows, pairs, q, dout, p, ds, ds_pairs;
    Buffer<float> dk, dv, dq, delta, shift, scores, dp;
    Dots<T, R> score_dots, slope_dots;
  };

  static Space& space() {
    thread_local Space space;
    return space;
  }

  // Writes a block of a query head's rows of dq.
  void write_dq(int64_t g, int64_t first) const {
    const float scale = static_cast<float>(a_.scale);
    for (int64_t query = first; query < std::min(first + QUERIES, a_.queries); query++) {
      T* to = a_.dq.at<T>(batch_, kv_head_ * group_ + g, query);
      prefetch_row<T, true>(to + AHEAD * a_.dq.row, a_.dim);
      const float* from = dq_ + (g * padded_queries_ + query) * dim_;
      for_columns(a_.dim, [&](int64_t column, auto lanes) {
        store(to + column, load(from + column, lanes) * scale, lanes);
      });
    }
  }

  const Arguments& a_;
  const Dropout& dropout_;
  const int64_t batch_, kv_head_, group_ = a_.heads / a_.kv_heads, block_keys_ = keys_of_a_block(a_.keys);
  const int64_t dim_ = round_up(a_.dim, 2 * PAD), v_dim_ = round_up(a_.v_dim, 2 * PAD);
  const int64_t padded_queries_ = round_up(a_.queries, QUERIES);
  Space& space_ = space();
  Dots<T, R>&scores_ = space_.score_dots, &slopes_ = space_.slope_dots;  // q k^T and do v^T
  C *q_t_, *dout_t_;  // transposed, block by block
  float *dq_, *delta_, *shift_;  // `shift_`: the products of the output's gradients with the values' mean
};

template <class Run>
void with_types(const Arguments& a, Run&& run) {
  const auto with_int8 = [&](auto type, auto compute) {
    if (a.int8) return run(type, compute, int8_t{});
    run(type, compute, compute);
  };
  if (a.compute_dtype == BFLOAT16) return with_int8(bfloat16{}, bfloat16{});
  with_dtype(a.dtype, [&](auto type) { with_int8(type, float{}); });
}

// Counts the scores and the numbers of rows: with few tokens these are most of the work.
int threads(const Arguments& a) {
  const int64_t a_head = a.queries * a.keys + (a.queries + a.keys) * (a.dim + a.v_dim);
  return useful_threads(a.n_threads, a.batches * a.heads * a_head);
}

}  // namespace
}  // namespace fastln

using namespace fastln;

extern "C" {

void fastln_attention_forward(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const Dropout dropout(a.threshold, a.seed);
  HeadRounding rounding(a.out_rounding, a.out, a.batches, a.queries, QUERIES, a.heads);
  with_types(a, [&](auto type, auto compute, auto dots) {
    for_blocks(a.batches * a.heads, threads(a), [&](int64_t head) {
      Head<decltype(type), decltype(compute), decltype(dots)>(a, dropout, head / a.heads, head % a.heads)
          .forward(rounding);
    });
  });
}

void fastln_attention_backward(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const Dropout dropout(a.threshold, a.seed);
  const auto rounding = [&](const Rounding* of, const Rows& rows, int64_t n_rows, int64_t block) {
    return HeadRounding(of, rows, a.batches, n_rows, block, a.kv_heads);
  };
  const int64_t block_keys = keys_of_a_block(a.keys);
  GradientRoundings roundings{rounding(a.dq_rounding, a.dq, a.queries, QUERIES),
                              rounding(a.dk_rounding, a.dk, a.keys, block_keys),
                              rounding(a.dv_rounding, a.dv, a.keys, block_keys)};
  with_types(a, [&](auto type, auto compute, auto dots) {
    for_blocks(a.batches * a.kv_heads, threads(a), [&](int64_t head) {
      Gradients<decltype(type), decltype(compute), decltype(dots)>(a, dropout, head / a.kv_heads, head % a.kv_heads)
          .run(roundings);
    });
  });
}

}  // extern "C"
