//! What is settled is what the whole head gives, however little is known: random logits of which some
//! are bounds, and cuts that end near a token's edge.

use kernels::FloatKind;

use super::*;

const VOCAB: usize = 300;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    /// From 0 to 1.
    fn share(&mut self) -> f32 {
        self.below(1 << 20) as f32 / (1 << 20) as f32
    }
}

/// Logits that bf16 holds: of a head of one column and an activation of 1.
fn logits(random: &mut Random) -> Vec<u16> {
    let (width, steps) =
        [(2.0, 1e9), (12.0, 1e9), (30.0, 1e9), (6.0, 2.0), (0.0, 1.0)][random.below(5) as usize];
    let logit = |random: &mut Random| {
        // The sum of some: a bell with few in its tails.
        let x = width * (0..3).map(|_| random.share() - 0.5).sum::<f32>();
        ((x * steps).round() / steps).to_bits()
    };
    (0..VOCAB).map(|_| (logit(random) >> 16) as u16).collect()
}

fn parameters(random: &mut Random) -> SamplingParameters {
    let temperature = [1e-20, 0.1, 0.6, 1.0, 2.0, 1e6][random.below(6) as usize];
    let mut parameters = SamplingParameters { temperature, ..SamplingParameters::default() };
    parameters.seed = random.below(1 << 30);
    if random.below(3) > 0 {
        let cuts = [0.05, 0.5, 0.8, 0.9, 0.99, 0.999_999, 1e-30];
        parameters.top_p = cuts[random.below(7) as usize];
    }
    if random.below(3) == 0 {
        parameters.top_k = [1, 2, 5, 130, 299][random.below(5) as usize];
    }
    if random.below(3) == 0 {
        parameters.min_p = [1e-38, 1e-6, 0.05, 0.3, 1.0][random.below(5) as usize];
    }
    if random.below(4) == 0 {
        parameters.logit_bias = (0..5).map(|i| (40 * i, 3.0 - i as f32)).collect();
    }
    parameters
}

#[test]
fn what_is_settled_is_what_all_logits_give() {
    let backend = Backend::detect();
    let mut random = Random(5);
    let mut planes = sampler::Scratch::new(VOCAB).unwrap();
    let mut scratch = Scratch::new();
    let (mut settled, mut rounds) = (0, 0);
    for _ in 0..20_000 {
        let bits = logits(&mut random);
        let head = FloatMatrix::new(FloatKind::Bf16, &bits, VOCAB, 1).unwrap();
        let all: Vec<f32> =
            bits.iter().map(|bits| f32::from_bits(u32::from(*bits) << 16) + 0.0).collect();
        let mut parameters = parameters(&mut random);
        let position = random.below(1 << 20) as u32;
        if random.below(4) == 0 && parameters.top_p < 1.0 {
            parameters.top_p = edge(backend, &all, &parameters, &mut random);
        }
        let key = draw_key(parameters.seed, parameters.choice, position);
        let temperature = f64::from(parameters.temperature);
        let slack = [1e-6, 0.3, 2.0][random.below(3) as usize];
        let bounds: Vec<f32> =
            all.iter().map(|logit| (logit + slack * random.share()).next_up()).collect();
        let is_biased = |token: usize| {
            parameters.logit_bias.iter().any(|(biased, _)| *biased as usize == token)
        };
        let adjusted: Vec<f32> = (0..VOCAB)
            .map(|token| sampler::adjusted(token as u32, all[token], &parameters))
            .collect();
        let noisy = |token: usize, logit: f32| {
            sampler::noisy(logit, temperature, gumbel(key, token as u32))
        };
        let best = (0..VOCAB).map(|token| noisy(token, adjusted[token])).fold(f64::MIN, f64::max);
        let more = random.below(3);
        let known: Vec<f32> = (0..VOCAB)
            .map(|token| {
                let is_left_out = noisy(token, bounds[token]) < best && !is_biased(token);
                let is_out = is_left_out && random.below(10) >= more;
                if is_out { f32::NEG_INFINITY } else { all[token] }
            })
            .collect();
        let question = Question {
            backend,
            head,
            x: &[1.0],
            logits: &known,
            bounds: &bounds,
            parameters: &parameters,
            position,
        };
        let found = question.settle(&mut scratch, &mut planes).unwrap();
        let want = sampler::sample(backend, &all, &parameters, position, &mut planes).unwrap();
        if let Some(token) = found.token {
            assert_eq!(token, want.token, "{parameters:?}, {found:?}");
            settled += 1;
            rounds += usize::from(found.rows > 0);
        }
    }
    println!("{settled} settled, {rounds} of them by computing rows");
    assert!(settled > 10_000 && rounds > 1_000, "{settled} settled, {rounds} after more rows");
}

/// A share at which a top-p cut ends with some token, or one rounding beside it.
fn edge(
    backend: Backend,
    all: &[f32],
    parameters: &SamplingParameters,
    random: &mut Random,
) -> f32 {
    let adjusted: Vec<f32> =
        (0..VOCAB).map(|token| sampler::adjusted(token as u32, all[token], parameters)).collect();
    let best = sampler::greatest(&adjusted);
    let exponents: Vec<f32> =
        adjusted.iter().map(|logit| (logit - best) / parameters.temperature).collect();
    let mut weights = vec![0.0; VOCAB];
    backend.exp(&exponents, &mut weights);
    let total = f64::from(backend.sum(&weights));
    weights.sort_by(|a, b| b.total_cmp(a));
    let end = random.below(20) as usize;
    let sum = weights[..=end].iter().map(|weight| f64::from(*weight)).sum::<f64>();
    let share = (sum / total) as f32;
    let share = [share.next_down(), share, share.next_up()][random.below(3) as usize];
    share.clamp(f32::MIN_POSITIVE, 1.0)
}

#[test]
fn an_infinite_logit_fails() {
    let backend = Backend::detect();
    let bits = [0x3f80; 4];
    let head = FloatMatrix::new(FloatKind::Bf16, &bits, 4, 1).unwrap();
    let parameters = SamplingParameters {
        temperature: 1.0,
        top_p: 0.9,
        logit_bias: vec![(0, 3e38), (0, 3e38)],
        ..SamplingParameters::default()
    };
    let question = Question {
        backend,
        head,
        x: &[1.0],
        logits: &[1.0; 4],
        bounds: &[2.0; 4],
        parameters: &parameters,
        position: 3,
    };
    let found = question.settle(&mut Scratch::new(), &mut sampler::Scratch::new(4).unwrap());
    assert_eq!(found, Err(NotFinite));
}
